"""``cmkd methods`` and ``cmkd memory-info``: what is on offer, what is in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmkd_scale.losses import LOSSES
from cmkd_scale.memory.bank import FILE_NAME, load_memory, thin_classes
from cmkd_scale.training.methods import METHODS


def methods() -> list[dict[str, Any]]:
    """The method table: what each row needs and its default weights."""
    return [
        {
            "name": name,
            "summary": method.summary,
            "needs_memory": method.needs_memory,
            "memories": method.memories or int(method.needs_memory),
            "needs_pairs": method.modes == ("paired",),
            "needs_live_teacher": method.live,
            "needs_teacher_data": method.live,
            "needs_student_labels": True,
            "needs_unlabelled": method.unlabelled,
            "modes": list(method.modes),
            "trains_teacher": method.trains_teacher,
            "students": method.students,
            "extra_parameters": method.students > 1
            or any(LOSSES[name].build is not None for name in method.components),
            "update": method.update,
            "inner": dict(method.inner),
            "guarded": method.guarded,
            "weights": dict(method.weights),
            "source": method.source,
            "departs": method.departs,
        }
        for name, method in METHODS.items()
    ]


def memory_info(path: Path) -> dict[str, Any]:
    """Classes, prototypes, masses, what is known of each class, digest and provenance.

    Raises:
        UsageError: there is none.
        IntegrityError: it is damaged.
    """
    memory = load_memory(path)
    file = path / FILE_NAME if path.is_dir() else path
    per_class = memory.prototype_class.bincount(minlength=len(memory.class_names))
    known = [int(count) for count in per_class if count > 0]
    risk = memory.class_risk[~memory.class_risk.isnan()]
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "classes": len(memory.class_names),
        "classes_with_prototypes": len(known),
        "prototypes": len(memory.prototypes),
        "prototypes_per_class": {"smallest": min(known), "largest": max(known)},
        "smallest_mass": float(memory.prototype_mass.min()),
        "largest_mass": float(memory.prototype_mass.max()),
        "feature_dim": memory.feature_dim,
        "samples": int(memory.class_count.sum()),
        "samples_kept": int(memory.class_kept.sum()),
        "thin_classes": thin_classes(memory),
        "covariance_rank": memory.class_factor.shape[1],
        "classes_listed_in_a_soft_label": memory.soft_label_values.shape[1],
        "largest_unlisted_probability": float(memory.soft_label_rest.max()),
        "temperature": memory.temperature,
        "cost_scale": float(memory.cost_scale),
        "classes_with_held_out_risk": len(risk),
        # Null if no class has held-out samples: 0 would be a perfect teacher.
        "mean_held_out_risk": float(risk.mean()) if len(risk) else None,
        "digest": memory.digest(),
        "provenance": dict(memory.provenance),
    }
