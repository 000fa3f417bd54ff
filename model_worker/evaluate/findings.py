"""The figures of an adapter are compared here with what the paper found, and with what slots must carry.

A finding is shown where the whole 95 % interval of its paired difference is on the right side of zero; the two margins
ask the mean alone. Findings that fail are reported like the others.
"""

from dataclasses import dataclass

from torch import Tensor

from model_worker.evaluate.adapter import Evaluation
from model_worker.evaluate.interval import Interval, interval
from model_worker.evaluate.restoration import Reader, Restoration

BELOW_OTHER, BELOW_PLAIN = 0.9, 0.4  # nats per token


@dataclass(frozen=True)
class Finding:
    """One claim and what was measured of it.

    name: what should be seen. shown: whether it was. figures: the measured values, for people.
    """

    name: str
    shown: bool
    figures: str


def margins(found: Evaluation) -> list[Finding]:
    """Return by how many nats per token slots of a span's text beat what does not carry that text.

    Each margin is shown where the mean difference is at least the limit that its name says.
    """
    span = found.contents["natural"].tokens
    return [
        Finding(f"own slots at least {limit} nats below {name}, {own.tokens} tokens", below.mean >= limit, str(below))
        for own in found.lengths
        if own.tokens >= span
        for name, below, limit in (
            ("another text's", own.below_other, BELOW_OTHER),
            ("the plain model", own.below_plain, BELOW_PLAIN),
        )
    ]


def findings(found: Evaluation) -> list[Finding]:
    """Return the six findings of the paper that a small model can show, the last in two parts."""
    whole = found.contents["natural"]
    one_span = [own for own in found.lengths if own.tokens <= whole.tokens]
    return [
        Finding(
            "1 restoration loss: own slots below another text's and below the plain model",
            whole.below_other.above_zero and whole.below_plain.above_zero,
            f"{_mean(whole.own.nats)} own, {_mean(whole.other.nats)} other, {_mean(whole.plain.nats)} plain",
        ),
        _written(whole),
        _falls(one_span[0], whole),
        _rises(found.parts[0], found.parts[-1]),
        _natural(found.contents),
        _continues(found),
        _budget(found),
    ]


def _written(whole: Restoration) -> Finding:
    name = "2 free-running restoration: better than with another text's slots, or none"
    own, rivals = whole.own, [r for r in (whole.other, whole.plain) if r.prefix is not None]
    if own.prefix is None:
        return Finding(name, False, "nothing was written")
    better = all(_over(own.prefix, r.prefix).above_zero and (own.bleu or 0) > (r.bleu or 0) for r in rivals)
    texts = [_free(reader) for reader in (own, whole.other, whole.plain)]
    return Finding(name, better, f"BLEU and exact prefix {texts[0]} own, {texts[1]} other, {texts[2]} plain")


def _falls(short: Restoration, long: Restoration) -> Finding:
    less = interval(short.own.right - long.own.right)
    figures = f"accuracy {_mean(short.own.right)} at {short.tokens} tokens, {_mean(long.own.right)} at {long.tokens}"
    return Finding("3 accuracy falls with length at a fixed k", less.above_zero, f"{figures}; difference {less}")


def _rises(few: Restoration, many: Restoration) -> Finding:
    name = "4 accuracy rises with the slots a text gets"
    if few is many:
        return Finding(name, False, "no more slots fit the model's positions")
    more = interval(many.own.right - few.own.right)
    figures = f"accuracy {_mean(few.own.right)} in {few.slots} slots, {_mean(many.own.right)} in {many.slots}"
    return Finding(name, more.above_zero, f"{figures}; difference {more}")


def _natural(contents: dict[str, Restoration]) -> Finding:
    natural = contents["natural"].own.right
    better = [interval(natural - contents[name].own.right).above_zero for name in ("shuffled", "random")]
    figures = ", ".join(f"{_mean(own.own.right)} {name}" for name, own in contents.items())
    return Finding(
        "5 natural text restores better than shuffled and than random text", all(better), f"accuracy {figures}"
    )


def _continues(found: Evaluation) -> Finding:
    own = found.continuations[0]
    gaps = interval(own.slots - own.full), interval(own.none - own.slots)
    figures = f"{_mean(own.full)} full, {_mean(own.slots)} slots, {_mean(own.none)} none"
    more = f"; slots above full {gaps[0]}, none above slots {gaps[1]}"
    name = f"6a loss of what follows {own.context} tokens: full context below slots below nothing"
    return Finding(name, all(gap.above_zero for gap in gaps), figures + more)


def _budget(found: Evaluation) -> Finding:
    own = found.continuations[-1]
    gap = interval(own.last - own.slots)
    name = f"6b {own.context} tokens as {own.budget} slots: below their last {own.budget} tokens"
    return Finding(name, gap.above_zero, f"{_mean(own.slots)} slots, {_mean(own.last)} last tokens; difference {gap}")


def _over(own: Tensor, other: Tensor | None) -> Interval:
    return interval(own if other is None else own - other)


def _free(reader: Reader) -> str:
    return "-" if reader.prefix is None else f"{reader.bleu or 0:.1f} and {_mean(reader.prefix)}"


def _mean(values: Tensor) -> str:
    return f"{float(values.mean()):.3f}"
