"""The sections of a configuration: every key, its default, its unit and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator


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
    collective_timeout_seconds: float = Field(1800.0, gt=0)
    """Longest that a process waits for the others before it takes them for lost."""
    watchdog_seconds: float = Field(3600.0, ge=0)
    """A process that does not move for so long ends the run, naming where each one stands;
    0: none."""


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
    mode: Literal["unpaired", "class_matched", "paired"] = "unpaired"
    """For methods with a teacher that runs beside the student, which sample of the teacher's
    stands beside each of the student's: any, one of the same class, or the one of the same key."""
    unlabelled: Literal["none", "rest", "unlabelled"] = "none"
    """Samples that are read without labels: none; those that ``n_per_class`` leaves over, with
    their labels unread; or those that have no label."""
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
    log_order: bool = False
    """Write the keys of the samples that each step reads to ``order/`` in the run directory."""
    transform: dict[str, float | int] = Field(default_factory=dict)
    """Options of the modality's decoding and augmentation, e.g. ``n_mels``, ``frames``."""


class ModelConfig(Section):
    """Encoder, projection to the shared feature space, head."""

    encoder: str | None = None
    """Name in the table of small encoders; unset takes the usual one of the modality."""
    width: int = Field(16, ge=8)
    """Channels of the encoder's first stage (ResNet) or its hidden width (transformer)."""
    depth: int = Field(1, ge=1)
    """Blocks a stage (ResNet) or layers (transformer)."""
    backbone: str | None = None
    """In the place of a small encoder: id of a pretrained model on the Hugging Face hub, or its
    directory. Inputs are made by its own processor."""
    revision: str | None = None
    """Branch, tag or commit of the hub's model."""
    backbone_config: dict[str, Any] = Field(default_factory=dict)
    """Options over the backbone's configuration; without ``backbone``, with ``model_type``: that
    architecture with random weights, which reads the modality as the small encoders do."""
    tuning: Literal["full", "frozen", "lora"] = "full"
    """What of a backbone is trained: all, nothing, or low-rank adapters."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(32, ge=1)
    """Their scale is this by their rank."""
    lora_targets: list[str] = Field(default_factory=list)
    """Names of the linear layers that are adapted; empty: all."""
    pooling: Literal["auto", "cls", "mean", "pooled"] = "auto"
    """What becomes of a backbone's places: its first token, their mean over what is no padding, or
    its own pooling; auto: as is usual in its family."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Implementation of a backbone's attention; auto: torch's (SDPA) where the family has it."""
    feature_dim: int | None = Field(None, ge=2)
    """Width of the shared feature space; unset: 128, or the memory's for a student."""


class TeacherConfig(Section):
    """The teacher that a memory is built from."""

    run: Path | None = None
    """Run directory of a finished ``cmkd teacher``."""
    shards: str | None = None
    """Where a teacher that runs beside the student finds its own samples; unset: the shards that
    it was trained on."""
    cache: Path | None = None
    """A directory of one teacher's outputs, each split in one of its own. ``cmkd memory`` reads
    what is there and writes what is not; a student whose method reads a frozen teacher sample by
    sample reads them in its place (of samples that are not augmented)."""

    @field_validator("cache", mode="before")
    @classmethod
    def _local(cls, cache: object) -> object:
        """Of a URL, ``Path`` would make a directory without a word."""
        if "://" in str(cache):
            raise ValueError("must be a directory, not a URL")
        return cache


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
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of that forward pass, for large teachers on GPUs; what is kept is float32."""
    previous: Path | None = None
    """Memory (or run) of the same teacher before it was trained further: prototypes go one pass
    of k-means on from there and keep their order, instead of being found anew."""


class MethodConfig(Section):
    """How the student learns from the memory; weights left unset are the method's own."""

    name: str | None = None
    """Name in the table of methods (``cmkd methods``); unset: ``ce`` for a teacher,
    ``ucmkd_global`` for a student."""
    control: Literal["none", "permuted", "random", "orthogonal"] = "none"
    """Teacher replaced by one with permuted classes, by an untrained one, or by one to whom all
    classes are equally unlike: a null control."""
    guard: bool | None = None
    """Let the guard decide, from a short training without the teacher, how far it is trusted, so
    that a wrong teacher does no harm; unset: as the method has it (``ucmkd_global``: yes)."""
    guard_steps: int | None = Field(None, ge=1)
    """Steps of that training; unset: a fifth of ``train.steps``."""
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
    """Samples a step over all processes and all parts that gradients are accumulated over."""
    unlabelled_batch_size: int | None = Field(None, ge=1)
    """Samples without labels a step, over all processes; unset: as many as with labels."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Parts that each process cuts its share of a batch into, one forward and backward each."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of the schedule."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine to zero, or a constant that ends in a decay (WSD)."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Part of all steps, the last one, in which ``wsd`` decays to zero."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """The learning rate of each block of the encoder is this times that of the block after it."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decoupled weight decay of matrices; norms and biases are exempt."""
    gradient_clip_norm: float = Field(5.0, gt=0)
    """Largest norm of the whole gradient."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Weight that the average of the weights keeps at each step; what is evaluated and used
    later is the average then. Unset: the weights themselves."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of the forward pass; parameters and losses are float32 always."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the model (``torch.compile``)."""
    max_skipped_steps: int = Field(3, ge=0)
    """Steps in a row whose gradient is not finite that are left out before the run rolls back to
    its newest checkpoint."""
    explosion_factor: float = Field(20.0, gt=1)
    """A loss above this times its mean over the last 100 steps (if that is positive, else as far
    above it as its size allows), in 5 steps in a row, counts as exploded: the run rolls back."""
    max_rollbacks: int = Field(2, ge=0)
    """Times that a run may roll back, reading on after the data that it failed on, before it
    stops."""
    check_ranks_every_steps: int = Field(100, ge=1)
    """Steps between two checks that all ranks hold the same memory, potentials and statistics."""
    log_every_steps: int = Field(10, ge=1)
    """Steps between two lines of ``metrics.jsonl``."""
    checkpoint_every_steps: int = Field(100, ge=1)
    """Steps between two checkpoints; one more is written at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    max_checkpoint_failures: int = Field(3, ge=0)
    """Checkpoints in a row that cannot be written (disk full) before the run stops."""


class MonitorConfig(Section):
    """How a run is watched."""

    prometheus_port: int | None = Field(None, ge=0, le=65535)
    """Port of ``/metrics`` and ``/healthz`` of the first process of a machine; each further one
    takes the next. Unset: no endpoint."""
    prometheus_address: str = "127.0.0.1"
    """Address that the endpoint listens on; ``0.0.0.0`` or ``::``: all."""
    targets_dir: Path | None = None
    """Where each process writes a file that leads Prometheus (``file_sd_configs``) to it; several
    runs may share it. Unset: ``targets/`` in the run directory."""
    linger_seconds: float = Field(30.0, ge=0)
    """Longest that a process whose endpoint has been scraped waits at its end to be scraped once
    more, so that its last values are seen. Wants to be longer than the scrape interval."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list
    )
    """Trackers that take every logged step, too, under one id however often the run is queued."""
    deadline: AwareDatetime | None = None
    """When the run should be through, with a time zone, as in ``2026-12-24T18:00:00Z``: exported,
    for an alert when it will be later."""
