"""The report's first sentence: what the runs say, with numbers, for and against.

A method is held against the control without a teacher (``ce_ls``, else ``ce``) and, where
it was run, against itself with a teacher whose classes are permuted: only what such a
teacher does not give comes from the teacher's knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence

from cmkd_scale.monitoring.report_runs import CONTROLS, Group


def find_control(groups: Sequence[Group]) -> Group | None:
    """Return the control without a teacher, if one has been evaluated."""
    scored = {group.method: group for group in groups if group.accuracies}
    return next((scored[name] for name in CONTROLS if name in scored), None)


def verdict(groups: Sequence[Group]) -> str:
    """Say in one sentence what comparable groups show.

    Args:
        groups: by method, the most accurate first.
    """
    scored = [group for group in groups if group.accuracies]
    if not scored:
        steps = max(
            (record["step"] for g in groups for r in g.runs for record in r.steps), default=0
        )
        return f"No test result yet; the last logged step is {steps}."
    control = find_control(scored)
    methods = [g for g in scored if g.method not in CONTROLS and "/" not in g.method]
    if not methods or control is None:
        best = methods[0] if methods else scored[0]
        sentence = f"{best.method} reaches a test accuracy of {_accuracy(best)}"
        if len(scored) == 1:
            return f"{sentence}{_chance(best)}."
        missing = "no control without a teacher" if methods else "no method with a teacher"
        return f"{sentence}; there is {missing} to compare with."
    return _comparison(methods[0], control, scored)


def _comparison(best: Group, control: Group, scored: Sequence[Group]) -> str:
    """Hold the best method against the control and against a class-permuted teacher."""
    permuted = next((g for g in scored if g.method == f"{best.method}/permuted"), None)
    named = [best, control] if permuted is None else [best, control, permuted]
    counts = {len(group.accuracies) for group in named}
    common = counts.pop() if len(counts) == 1 else 1
    over = f"Over {common} seeds, " if common > 1 else ""
    ours, theirs = _accuracy(best, common), _accuracy(control, common)
    if best.mean <= control.mean:
        sentence = (
            f"{over}{'no' if over else 'No'} method beats the control: {control.method} "
            f"reaches {theirs}, the best method {best.method} {ours}"
        )
    else:
        times = f"{best.mean / control.mean:.2f} times " if control.mean > 0 else "against "
        sentence = (
            f"{over}{best.method} reaches {ours}, {times}the control {control.method} with "
            f"{theirs}{_wins(best, control)}"
        )
    if permuted is not None:
        sentence += f"; with a class-permuted teacher it reaches {_accuracy(permuted, common)}"
    return f"{sentence}."


def _accuracy(group: Group, common: int = 1) -> str:
    """Write a mean with its spread over seeds, or the accuracy of one run.

    Args:
        group: what to write.
        common: number of seeds that the sentence has already said, if more than 1.
    """
    count = len(group.accuracies)
    if group.std is not None:
        spread = f"{100 * group.mean:.1f}%\u00a0±\u00a0{100 * group.std:.1f}"
        return spread if count == common else f"{spread} ({count} seeds)"
    seed = next(iter(group.accuracy_by_seed), None)
    return f"{100 * group.mean:.1f}% ({'one run' if seed is None else f'seed {seed}'})"


def _chance(group: Group) -> str:
    """Write what guessing would reach, where the number of classes is known."""
    for run in group.runs:
        classes = len(run.results.get("metrics", {}).get("test/per_class_accuracy", {}))
        if classes:
            return f"; chance is {100 / classes:.1f}%"
    return ""


def _wins(best: Group, control: Group) -> str:
    """Count the shared seeds in which the method is ahead."""
    ours, theirs = best.accuracy_by_seed, control.accuracy_by_seed
    shared = ours.keys() & theirs.keys()
    if not shared:
        return ""
    wins = sum(ours[seed] > theirs[seed] for seed in shared)
    return f", ahead in {wins} of {len(shared)} seeds"
