"""cmkd_scale: cross-modal knowledge distillation without paired data, at scale."""

__version__ = "0.2.0"
