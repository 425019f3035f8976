"""The open table ``METHODS`` behind ``cmkd methods`` and ``method.name``: a method is data.

Adding a method is one row; a new loss is one file in ``losses/`` and one row of ``LOSSES``. All
rows but ``ce`` smooth their labels by 0.1, as the reference does for its own method alone; weights
are those of the papers or their released code unless a row says otherwise.
"""

from __future__ import annotations

from cmkd_scale.training.method import ANY_MODE, CLASS_MATCHED, Method

_LABELS = {"smoothed_cross_entropy": 1.0}

_GLOBAL = _LABELS | {
    "transport_cost": 1.0,
    "teacher_head": 1.0,
    "transported_soft_label": 10.0,
    "teacher_head_soft_label": 10.0,
    "head_pull": 0.1,
    "class_bures": 0.0,
}

METHODS: dict[str, Method] = {
    "ce": Method(
        summary="cross-entropy alone",
        weights={"cross_entropy": 1.0},
    ),
    "ce_ls": Method(
        summary="cross-entropy with label smoothing 0.1: the control of every method",
        weights=_LABELS,
        source="Szegedy et al. 2016, section 7",
    ),
    "fixmatch": Method(
        summary="self-training on unlabelled samples: the control of rows that read them",
        weights=_LABELS | {"pseudo_label": 1.0},
        source="Sohn et al. 2020 (arXiv 2001.07685), equation 4",
        departs="labels are smoothed, so the threshold is 0.8",
    ),
    "kd": Method(
        summary="the soft label that a live teacher gives its sample of the same class",
        weights={"smoothed_cross_entropy": 0.1, "live_soft_label": 0.9},
        source="Hinton et al. 2015, section 2",
        modes=CLASS_MATCHED,
    ),
    "kd_memory": Method(
        summary="distillation from the memory's mean soft label of the class",
        weights=_LABELS | {"class_soft_label": 3.0},
        source="Hinton et al. 2015, section 2",
        departs="soft labels are averaged by class; their weight is the best of 0.3, 1 and 3",
    ),
    "dkd": Method(
        summary="target and non-target parts of the soft label, weighted apart",
        weights=_LABELS | {"target_class": 1.0, "non_target_class": 8.0},
        source="Zhao et al. 2022 (arXiv 2203.08679), equation 7",
        departs="no warm-up of the weights",
        modes=CLASS_MATCHED,
    ),
    "dist": Method(
        summary="correlation with the teacher's soft labels, by sample and by class",
        weights=_LABELS | {"row_correlation": 2.0, "column_correlation": 2.0},
        source="Huang et al. 2022 (arXiv 2205.10536), equations 8 to 11",
        modes=CLASS_MATCHED,
    ),
    "rkd": Method(
        summary="distances and angles between samples as in the teacher's features",
        weights=_LABELS | {"relative_distance": 25.0, "relative_angle": 50.0},
        source="Park et al. 2019 (arXiv 1904.05068), equations 5 to 9",
        modes=CLASS_MATCHED,
    ),
    "c2kd": Method(
        summary="proxies of both networks, both ways, on samples whose rankings agree",
        weights={"c2kd": 1.0},
        source="Huo et al. 2024 (CVPR)",
        modes=CLASS_MATCHED,
        trains_teacher=True,
    ),
    "review_kd": Method(
        summary="the teacher's stages, fused deep to shallow",
        weights=_LABELS | {"review_kd": 1.0},
        source="Chen et al. 2021 (arXiv 2104.09044), sections 3.2 to 3.4",
        departs="stages are resized to each other's, as modalities differ in shape",
        modes=CLASS_MATCHED,
    ),
    "norm": Method(
        summary="several expanded copies of the student's feature against the teacher's",
        weights=_LABELS | {"norm": 1.0},
        source="Liu et al. 2023 (arXiv 2305.13803)",
        departs="pooled features; without the branch that contracts again",
        modes=CLASS_MATCHED,
    ),
    "feature_ot": Method(
        summary="entropic transport between minibatches of features",
        weights=_LABELS | {"minibatch_transport": 0.3},
        source="Tran et al. 2026 (arXiv 2606.10504), its ablation",
        departs="weight 0.3 instead of 1, which is better here",
        modes=("class_matched", "paired", "unpaired"),
    ),
    "sumall": Method(
        summary="minibatch transport and the label gap, added up",
        weights={"label_gap": 1.0, "minibatch_transport": 1.0, "smoothed_cross_entropy": 1.0},
        source="Tran et al. 2026 (arXiv 2606.10504), its ablation",
        modes=CLASS_MATCHED,
    ),
    "ucmkd_reference": Method(
        summary="the released algorithm, faults included: its label term has no teacher",
        weights=_LABELS,
        source="Tran et al. 2026 (arXiv 2606.10504), algorithm 1 as released",
        modes=CLASS_MATCHED,
        update="bilevel",
        inner=(("minibatch_transport", 1), ("constant_label_gap", 1)),
        inner_learning_rate=5e-5,
        inner_weight_decay=0.05,
    ),
    "ucmkd_fixed": Method(
        summary="the same with a gradient through the teacher's head",
        weights=_LABELS,
        source="Tran et al. 2026 (arXiv 2606.10504), algorithm 1, mended",
        modes=CLASS_MATCHED,
        update="bilevel",
        inner=(("minibatch_transport", 1), ("taught_label_gap", 1)),
        # Moves of 4e-4 cost 5 points: what is trained are the adapted weights, what is kept are
        # not.
        inner_learning_rate=1e-4,
        inner_weight_decay=0.0,
    ),
    "ucmkd_global": Method(
        summary="transport to the global prototypes, label alignment, head transfer",
        weights=_GLOBAL,
        head_transfer=True,
        source="Tran et al. 2026 (arXiv 2606.10504), made global",
        guarded=True,
    ),
    "ucmkd_semi": Method(
        summary="ucmkd_global, and soft labels of what unlabelled samples are taken for",
        weights=_GLOBAL | {"pseudo_soft_label": 10.0},
        head_transfer=True,
        source="Tran et al. 2026 (arXiv 2606.10504), made global; Sohn et al. 2020 (2001.07685)",
        guarded=True,
    ),
    "coral": Method(
        summary="mean and covariance of all features as the memory's",
        weights=_LABELS | {"coral": 0.3},
        source="Sun and Saenko 2016 (arXiv 1607.01719), equation 1",
        departs="the teacher's moments are those of the memory, and means count, too; weight 0.3, "
        "since 1 and 3 do harm",
    ),
    "mmd": Method(
        summary="kernel distance of the features to the memory's prototypes",
        weights=_LABELS | {"mmd": 0.3},
        source="Long et al. 2015 (arXiv 1502.02791)",
        departs="the teacher's side are weighted prototypes; weight 0.3, since 1 and 3 do harm",
    ),
    "jumbot": Method(
        summary="unbalanced minibatch transport of features and labels",
        weights=_LABELS | {"jumbot": 1.0},
        source="Fatras et al. 2021 (arXiv 2103.03606)",
        departs="distances in units of the batch's mean",
        modes=ANY_MODE,
    ),
    "deepjdot": Method(
        summary="exact minibatch transport of features and labels",
        weights=_LABELS | {"deepjdot": 1.0},
        source="Damodaran et al. 2018 (arXiv 1803.10081), equations 5 and 6",
        modes=ANY_MODE,
    ),
    "socket": Method(
        summary="unlabelled samples made sure, diverse, and like the memory's moments",
        weights=_LABELS
        | {
            "information_maximisation": 1.0,
            "centroid_pseudo_label": 0.3,
            "moment_matching": 1.0,
        },
        head_transfer=True,
        source="Ahmed et al. 2022 (ECCV)",
        departs="learns from the labelled samples, too; no paired images of other tasks; "
        "the memory's moments stand for batch-norm statistics",
    ),
    "mutual": Method(
        summary="three students that learn from a live teacher's class and from each other",
        weights={
            "cohort_cross_entropy": 1.0,
            "cohort_teacher_class": 1.0,
            "mutual_divergence": 1.0,
        },
        source="Thoker and Gall 2019",
        departs="learns from labels, too",
        modes=CLASS_MATCHED,
        students=3,
    ),
    "robust_cmkd": Method(
        summary="contrast against the memory's prototypes, softer for those that are alike",
        weights=_LABELS | {"prototype_contrast": 3.0},
        source="Xia et al. 2023, the contrast term",
        departs="prototypes in the place of clips; no fusion network, which needs pairs; weight 3 "
        "is the best of 0.3, 1 and 3",
    ),
    "rich_kd": Method(
        summary="soft labels and contrast of two teachers' memories at once",
        weights=_LABELS | {"class_soft_label": 3.0, "plain_prototype_contrast": 0.8},
        source="Mansourian et al. 2025 (RichKD)",
        departs="fused in probabilities, equal parts, from memories of two modalities",
        memories=2,
    ),
}
