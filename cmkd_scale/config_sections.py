"""The sections of a configuration: every key, its default, its unit and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, fields explain themselves."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Path | None = None
    """Run directory; a stage started again on it continues from its newest valid checkpoint."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initial weights, order, augmentation and labelled subset."""
    world_size: int | None = Field(None, ge=1)
    """Number of processes this run must have; unset takes what the launcher gives."""


class DataConfig(Section):
    """What is read, and how it becomes tensors."""

    shards: str | None = None
    """A directory of shards, its URL (``s3:// gs:// https:// hf://``), or
    ``builtin:numbers/MODALITY``, which is built into the cache on first use."""
    modality: str | None = None
    """Which modality to read when the directory holds several."""
    source: Path | None = None
    """For ``builtin:``: directory of the raw data (for ``numbers/audio`` the FSDD)."""
    options: dict[str, str | int | float] = Field(default_factory=dict)
    """For ``builtin:``: options of the data set's builder, as in ``cmkd shards build``."""
    n_per_class: int | None = Field(None, ge=1)
    """Train on this many labelled samples a class, chosen by ``run.seed``; unset: on all."""
    sampling: Literal["natural", "square_root", "balanced"] = "natural"
    """How often each class is drawn in an epoch: by its count, the count's root, or equally."""
    label_map: dict[str, str] = Field(default_factory=dict)
    """Other names for classes of the shards, as in ``{zero: "0"}``: modalities meet by name."""
    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    """Damaged samples that a run goes on without, as a part of those that it reads."""
    train_split: str = "train"
    """Split to train on, and to build the memory from."""
    validation_split: str = "validation"
    """Held-out split for the teacher's risk in the memory."""
    test_split: str = "test"
    """Split to evaluate on; never used for any choice."""
    workers: int = Field(0, ge=0)
    """Decoding processes of each rank; 0 decodes in the training process."""
    cache_bytes: int = Field(512 * 2**20, ge=0)
    """Decoded samples kept in memory by each process, at most this many bytes."""
    cache_limit_bytes: int = Field(50 * 2**30, ge=0)
    """Remote shards kept on local disk by all processes of a machine, in ``CMKD_CACHE``."""
    augment: bool = True
    """Augment training samples."""
    transform: dict[str, float | int] = Field(default_factory=dict)
    """Options of the modality's decoding and augmentation, e.g. ``n_mels``, ``frames``."""


class ModelConfig(Section):
    """Encoder, projection to the shared feature space, head."""

    encoder: str | None = None
    """Name in the table of encoders; unset takes the usual one of the modality."""
    width: int = Field(16, ge=8)
    """Channels of the encoder's first stage (ResNet) or its hidden width (transformer)."""
    depth: int = Field(1, ge=1)
    """Blocks a stage (ResNet) or layers (transformer)."""
    feature_dim: int | None = Field(None, ge=2)
    """Width of the shared feature space; unset: 128, or the memory's for a student."""


class TeacherConfig(Section):
    """The teacher that a memory is built from."""

    run: Path | None = None
    """Run directory of a finished ``cmkd teacher``."""


class MemoryConfig(Section):
    """The prototype memory."""

    run: Path | list[Path] | None = None
    """Run directory of ``cmkd memory`` (or its ``memory.safetensors``) that a student uses; a
    list of them for several teachers, whose knowledge of each class is averaged."""
    prototypes_per_class: int | None = Field(None, ge=1)
    """Prototypes a class; unset: about the square root of the class's count, at most 64."""
    max_samples_per_class: int = Field(4096, ge=1)
    """Samples a class that are clustered, chosen by a hash of their key; moments are of all."""
    covariance_rank: int = Field(4, ge=0)
    """Leading directions of each class's covariance that are kept beside its diagonal."""
    temperature: float = Field(4.0, gt=0)
    """Temperature of the teacher's soft labels."""
    batch_size: int = Field(128, ge=1)
    """Samples in a forward pass of the frozen teacher."""
    previous: Path | None = None
    """Memory (or run) of the same teacher before it was trained further: prototypes go one pass
    of k-means on from there and keep their order, instead of being found anew."""


class MethodConfig(Section):
    """How the student learns from the memory; weights left unset are the method's own."""

    name: str | None = None
    """Name in the table of methods (``cmkd methods``); unset: ``ce`` for a teacher,
    ``ucmkd_global`` for a student."""
    control: Literal["none", "permuted", "random"] = "none"
    """Teacher replaced by one with permuted classes, or by an untrained one: a null control."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of a loss component by name, instead of the method's own."""
    transport: Literal["class_masked", "soft_label", "label_free"] = "class_masked"
    """Where a sample's mass may go: to prototypes of its class; to any, at a price for those
    whose soft label does not expect its class; to any, by features alone."""
    cost: Literal["euclidean", "squared_euclidean"] = "euclidean"
    """Ground cost of the transport, in units of the memory's cost scale."""
    label_cost: float = Field(1.0, ge=0)
    """Price of a nat of the soft label, in units of the median cost (``soft_label`` only)."""
    reweight: bool = True
    """Let target masses follow the student's class marginal instead of the teacher's."""
    epsilon_start: float = Field(0.1, gt=0)
    """Entropic regularisation at step 0, in units of the median cost."""
    epsilon_end: float = Field(0.02, gt=0)
    """Entropic regularisation at the end, reached geometrically half-way."""
    potential_rate: float = Field(0.1, gt=0)
    """Largest step of the transport potentials, in units of the median cost; a class of which a
    batch holds few samples moves less."""
    potential_optimizer: Literal["sgd", "averaged"] = "averaged"
    """Whether plans are made with the potentials that ascend, or with their average."""
    mass_relaxation: float | None = Field(None, gt=0)
    """rho of the unbalanced problem, in units of the median cost; unset: masses are kept."""
    debias: bool = False
    """Subtract the student's transport to itself (Sinkhorn divergence), through the ring."""
    search_candidates: int | None = Field(None, ge=1)
    """Prototypes that a FAISS search finds for each sample (``label_free`` with the squared cost
    only); unset: all are looked at."""
    search_least_mass: float = Field(0.9, ge=0, le=1)
    """Share of the plan that the candidates must hold; below it, all are looked at."""
    search_refresh_steps: int = Field(100, ge=1)
    """Steps between two checks of the search, at which it takes up the potentials."""
    ring_size: int = Field(2048, ge=0)
    """Newest student features of all ranks that are kept."""
    moments_decay: float = Field(0.99, gt=0, le=1)
    """Weight that the student's class moments keep at each step."""
    refresh_every_steps: int = Field(0, ge=0)
    """Steps between two refreshes of the potentials from the ring; 0: none."""
    refresh_iterations: int = Field(5, ge=1)
    """Steps of dual ascent in a refresh."""


class TrainConfig(Section):
    """The one step loop."""

    steps: int = Field(300, ge=1)
    """Optimiser steps."""
    global_batch_size: int = Field(64, ge=1)
    """Samples a step over all processes."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of the schedule."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up before the cosine to zero."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decoupled weight decay of matrices; norms and biases are exempt."""
    gradient_clip_norm: float = Field(5.0, gt=0)
    """Largest norm of the whole gradient."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward pass; losses are computed in float32 always."""
    check_ranks_every_steps: int = Field(100, ge=1)
    """Steps between two checks that all ranks hold the same memory, potentials and statistics."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two lines of ``metrics.jsonl``."""
    checkpoint_every_steps: int = Field(100, ge=1)
    """Steps between two checkpoints; one more is written at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""


class MonitorConfig(Section):
    """How a run is watched."""

    prometheus_port: int | None = Field(None, ge=0, le=65535)
    """Port of ``/metrics`` and ``/healthz``; unset: no endpoint."""
    prometheus_address: str = "127.0.0.1"
    """Address that the endpoint listens on."""
