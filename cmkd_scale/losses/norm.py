"""NORM: many student features for one of the teacher's.

Liu et al., "NORM: Knowledge Distillation via N-to-One Representation Matching" (2023, arXiv
2305.13803).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from cmkd_scale.losses.sizes import Linear, Sizes


class NormLoss(nn.Module):
    """Match each of N linear views of a student's feature with the teacher's, a live one.

    The paper (section 3) puts an expanding and a contracting 1x1 convolution, both linear, after
    the student's last stage and matches the expanded map. On a pooled feature the expansion is
    one linear layer; its bias stands for the shift of the BatchNorm that the released code has,
    whose statistics would depend on how a batch is split over processes. The contracting layer
    is left out: it feeds the student's own head, which reads its feature unchanged here.

    Row i of the teacher belongs to a sample of the same class as row i of the student.
    """

    def __init__(self, sizes: Sizes, copies: int = 4) -> None:
        """Make the layer.

        Args:
            sizes: of the student and its teacher.
            copies: N.
        """
        super().__init__()
        self.copies = copies
        self.expand = Linear(sizes.student_dim, copies * sizes.teacher_dim)

    def forward(self, features: Tensor, live_features: Tensor) -> Tensor:
        """N times the mean squared difference: the sum of the N views' mean squared differences.

        Args:
            features: [B, D] of the student.
            live_features: [B, E] of the teacher, a constant.
        """
        views = self.expand(features).unflatten(1, (self.copies, -1))
        wanted = live_features.detach().float().unsqueeze(1).expand_as(views)
        return self.copies * functional.mse_loss(views, wanted)
