"""The vocabulary of a running stage: what a logged step holds and which metric it feeds.

A step is logged as a flat mapping of names to numbers. These names are the contract
between the loop and everything that watches it (``metrics.jsonl``, console, exporter,
report); ``samples_seen`` and the like count from step 0 also after a resume, so that
nobody downstream has to know about restarts.

============================ ============================================================
``loss``                     total loss of the step, mean over the global batch
``loss/<component>``         one summand of it, weighted
``learning_rate``            of the step
``grad_norm``                before clipping
``samples_seen``             samples of the whole run, all ranks, since step 0
``samples_per_second``       all ranks, mean since the previous logged step
``step_seconds``             mean duration of a step since the previous logged step
``data_wait_seconds``        spent waiting for data since the previous logged step
``epoch_progress``           0..1, position in the current epoch
``samples_skipped/<reason>`` damaged samples left out since the previous logged step, all ranks
``bad_samples_ratio``        share of an epoch's samples found damaged so far; only if any is
``read_retries``             transfers tried again since the previous logged step, all ranks
``eta_seconds``              expected until the last step
``alignment_marginal_error`` L1 distance between the mass that prototypes received in about the
                             last 100 batches and the mass they should receive: the mean over
                             classes, or of the whole where mass may cross classes
``alignment_distance/<what>`` ``transport``: mean transported cost, in units of the median cost
``alignment_wrong_class_mass`` share of the mass that went to prototypes of another class
``guard_weight``             how far the guard trusts the teachers, 0 to 1, mean over memories
``ring_age_steps``           mean age of the student features that are kept
``memory_sync_seconds``      that the program waited for a step's exchange between ranks, mean
                             since the previous logged step (a GPU may go on waiting)
``memory_sync_bytes``        that this rank sent for it since the previous logged step
``memory_rank_mismatches``   ranks whose memory, potentials or statistics differed from rank 0's
``checkpoint_seconds``       from the beginning to the end of a checkpoint that was completed
``checkpoint_stall_seconds`` of which training waited
``checkpoint_failures``      checkpoints since the previous logged step that could not be written
``steps_skipped``            1, logged after a step whose gradient was not finite
``restarts/<reason>``        times that the whole run was resumed, or rolled back
``slowest_rank``             rank that took longest over its own part of the steps since the
                             previous logged one, ``slowest_rank_ratio`` times the others' median
``test/accuracy``            result of an evaluation at this step, likewise any ``test/...``
============================ ============================================================

``METRICS`` is the one table of Prometheus metrics: base units, ``_total`` on counters,
labels of few values, never a sample key. A metric is listed only if training feeds it.
Every rank has an endpoint: metrics of the scope ``rank`` are there on each, those of the
whole run on rank 0 alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
"""The Prometheus type of a metric."""

Scope = Literal["run", "rank"]
"""Whether rank 0 exports a metric for the whole run, or every rank its own."""

Feed = Literal["value", "total", "increment", "time", "step", "set", "probe", "constant"]
"""Where the metric's value comes from. A number of a logged step:

- ``value``: a gauge is set to it;
- ``total``: a counter is raised to it (the number counts from step 0);
- ``increment``: a counter grows by it (the number counts since the previous logged step);
- ``time``: a gauge is set to the Unix time at which the key was logged.

Something else:

- ``step``: every finished step of the rank;
- ``set``: what the program knows of the run beside its steps;
- ``probe``: asked for when somebody scrapes;
- ``constant``: 1; its labels carry the information.
"""


@dataclass(frozen=True, slots=True)
class Metric:
    """One Prometheus metric and the keys of a logged step that feed it."""

    name: str
    """The exposed name, with its unit and ``_total``."""
    kind: Kind
    help: str
    feed: Feed
    scope: Scope = "run"
    keys: tuple[str, ...] = ()
    """Keys of a logged step; ``prefix/*`` takes every key below it as the label's value."""
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram in its unit, without infinity."""


TOTAL_LOSS = "total"
"""Value of the label ``component`` under which the key ``loss`` appears."""

METRICS: tuple[Metric, ...] = (
    Metric(
        "cmkd_build_info",
        "gauge",
        "Versions of the program that runs; always 1.",
        "constant",
        scope="rank",
        labels=("version", "torch", "python"),
    ),
    Metric(
        "cmkd_run_info",
        "gauge",
        "What runs, and which of its processes this is; always 1.",
        "constant",
        scope="rank",
        labels=("run_id", "stage", "method", "modality", "rank", "world_size"),
    ),
    Metric(
        "cmkd_train_step",
        "gauge",
        "Last finished optimiser step of this rank.",
        "step",
        scope="rank",
    ),
    Metric(
        "cmkd_train_planned_steps",
        "gauge",
        "Steps of the whole run.",
        "set",
    ),
    Metric(
        "cmkd_train_start_timestamp_seconds",
        "gauge",
        "Unix time at which this process began to train.",
        "set",
    ),
    Metric(
        "cmkd_train_last_step_timestamp_seconds",
        "gauge",
        "Unix time at which this rank last finished a step.",
        "step",
        scope="rank",
    ),
    Metric(
        "cmkd_train_deadline_timestamp_seconds",
        "gauge",
        "Unix time by which the run should end, if monitor.deadline says so.",
        "set",
    ),
    Metric(
        "cmkd_eta_seconds",
        "gauge",
        "Expected seconds until the last step.",
        "value",
        keys=("eta_seconds",),
    ),
    Metric(
        "cmkd_train_samples_total",
        "counter",
        "Training samples of the whole run on all ranks, restarts included.",
        "total",
        keys=("samples_seen",),
        labels=("modality",),
    ),
    Metric(
        "cmkd_train_loss",
        "gauge",
        "Loss of the last logged step, in total and by component.",
        "value",
        keys=("loss", "loss/*"),
        labels=("component",),
    ),
    Metric(
        "cmkd_train_learning_rate",
        "gauge",
        "Learning rate of the last logged step.",
        "value",
        keys=("learning_rate",),
    ),
    Metric(
        "cmkd_train_gradient_norm",
        "gauge",
        "Norm of the gradient of the last logged step, before clipping.",
        "value",
        keys=("grad_norm",),
    ),
    Metric(
        "cmkd_train_steps_skipped_total",
        "counter",
        "Steps left out because their gradient was not finite.",
        "increment",
        keys=("steps_skipped",),
    ),
    Metric(
        "cmkd_train_step_duration_seconds",
        "histogram",
        "Duration of a step of this rank, with all that happens between two steps.",
        "step",
        scope="rank",
        buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    ),
    Metric(
        "cmkd_train_phase_seconds_total",
        "counter",
        "Seconds that this rank has spent in each phase of its steps.",
        "probe",
        scope="rank",
        labels=("phase",),
    ),
    Metric(
        "cmkd_train_slowest_rank",
        "gauge",
        "Rank that took longest over its own part of the steps lately.",
        "value",
        keys=("slowest_rank",),
    ),
    Metric(
        "cmkd_train_slowest_rank_ratio",
        "gauge",
        "Time of the slowest rank over its own part of a step, over the median of the others.",
        "value",
        keys=("slowest_rank_ratio",),
    ),
    Metric(
        "cmkd_restarts_total",
        "counter",
        "Times that the whole run was continued from a checkpoint, by reason.",
        "total",
        keys=("restarts/*",),
        labels=("reason",),
    ),
    Metric(
        "cmkd_data_wait_seconds_total",
        "counter",
        "Seconds that training on this rank spent waiting for data.",
        "step",
        scope="rank",
    ),
    Metric(
        "cmkd_data_workers",
        "gauge",
        "Processes that decode for this rank and are alive.",
        "probe",
        scope="rank",
    ),
    Metric(
        "cmkd_data_epoch_progress_ratio",
        "gauge",
        "Position in the current epoch, 0 to 1.",
        "value",
        keys=("epoch_progress",),
        labels=("modality",),
    ),
    Metric(
        "cmkd_data_read_retries_total",
        "counter",
        "Transfers of remote shards that had to be tried again.",
        "increment",
        keys=("read_retries",),
    ),
    Metric(
        "cmkd_data_samples_skipped_total",
        "counter",
        "Damaged samples that were left out, by reason.",
        "increment",
        keys=("samples_skipped/*",),
        labels=("reason",),
    ),
    Metric(
        "cmkd_data_bad_samples_ratio",
        "gauge",
        "Share of the samples of an epoch that were found damaged so far.",
        "value",
        keys=("bad_samples_ratio",),
    ),
    Metric(
        "cmkd_data_bad_samples_limit_ratio",
        "gauge",
        "Share of damaged samples above which the run ends.",
        "set",
    ),
    Metric(
        "cmkd_alignment_marginal_error",
        "gauge",
        "L1 distance of the prototype masses received lately to those wanted.",
        "value",
        keys=("alignment_marginal_error",),
    ),
    Metric(
        "cmkd_alignment_distance",
        "gauge",
        "Distance of student features to the memory, in units of its median cost.",
        "value",
        keys=("alignment_distance/*",),
        labels=("metric",),
    ),
    Metric(
        "cmkd_alignment_wrong_class_mass_ratio",
        "gauge",
        "Share of the transported mass that went to prototypes of another class.",
        "value",
        keys=("alignment_wrong_class_mass",),
    ),
    Metric(
        "cmkd_alignment_ring_age_steps",
        "gauge",
        "Mean age of the student features that are kept, in steps.",
        "value",
        keys=("ring_age_steps",),
    ),
    Metric(
        "cmkd_guard_weight",
        "gauge",
        "How far the guard trusts the teachers, 0 to 1; mean over memories.",
        "value",
        keys=("guard_weight",),
    ),
    Metric(
        "cmkd_memory_sync_duration_seconds",
        "gauge",
        "Seconds that a step waited for the exchange between ranks that backward did not hide.",
        "value",
        scope="rank",
        keys=("memory_sync_seconds",),
    ),
    Metric(
        "cmkd_memory_sync_bytes_total",
        "counter",
        "Bytes that this rank sent for the alignment.",
        "increment",
        scope="rank",
        keys=("memory_sync_bytes",),
    ),
    Metric(
        "cmkd_memory_rank_mismatch_total",
        "counter",
        "Ranks found to hold another memory, other potentials or statistics than rank 0.",
        "increment",
        keys=("memory_rank_mismatches",),
    ),
    Metric(
        "cmkd_checkpoint_duration_seconds",
        "gauge",
        "Duration of the last completed checkpoint.",
        "value",
        keys=("checkpoint_seconds",),
    ),
    Metric(
        "cmkd_checkpoint_last_success_timestamp_seconds",
        "gauge",
        "Unix time at which a checkpoint was last completed.",
        "time",
        keys=("checkpoint_seconds",),
    ),
    Metric(
        "cmkd_checkpoint_failures_total",
        "counter",
        "Checkpoints that could not be written.",
        "increment",
        keys=("checkpoint_failures",),
    ),
    Metric(
        "cmkd_checkpoint_stall_seconds_total",
        "counter",
        "Seconds that training waited for checkpoints.",
        "increment",
        keys=("checkpoint_stall_seconds",),
    ),
    Metric(
        "cmkd_checkpoint_interval_seconds",
        "gauge",
        "Expected seconds between two checkpoints at the present speed.",
        "set",
    ),
)
