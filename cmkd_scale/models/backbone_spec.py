"""What rebuilds a backbone: its configuration, and how it reads, pools and learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from cmkd_scale.models.families import Pooling, usual_pooling

Tuning = Literal["full", "frozen", "lora"]


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """What rebuilds a backbone without its weights, as JSON."""

    config: dict[str, Any]
    """Of ``transformers``, resolved."""
    pretrained: bool
    """Whether it began from weights of others."""
    pooling: Pooling
    tuning: Tuning = "full"
    attention: str = "auto"
    """Implementation; auto: the best that the family has."""
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = ()
    """Names of linear layers; empty: all of them."""
    padding: int | None = None
    """Token that stands behind the end of texts."""
    ragged: bool = False
    """Whether zeros at the end of a sample's time axis are padding."""
    masked: bool = False
    """Whether padding is to be told to the backbone."""
    source: str | None = None
    """Directory or hub's id that it came from."""
    revision: str | None = None
    weights_digest: str | None = None
    """Of the weights that it began from."""
    processor_digest: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> BackboneSpec:
        """The inverse of ``to_json`` after a trip through JSON.

        Raises:
            TypeError: it has other fields.
        """
        targets = tuple(value.get("lora_targets", ()))
        return BackboneSpec(**{**value, "lora_targets": targets})


def make_spec(config: dict[str, Any], *, pooling: str, **options: Any) -> BackboneSpec:
    """A spec; ``pooling`` auto is the family's usual one."""
    chosen = usual_pooling(str(config["model_type"])) if pooling == "auto" else pooling
    return BackboneSpec(config=config, pooling=cast(Pooling, chosen), **options)
