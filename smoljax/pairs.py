"""Rows of JSON lines as pairs of ids to score, a context and a continuation each. infer/score.py says which rows."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from smoljax.errors import DataError, UsageError
from smoljax.row_files import NoRow

FORMS = ("continuation", "choices", "text", "continuation_ids")  # the key that tells a row's kind
OUT = {"line", "error", "loglikelihood", "loglikelihoods", "tokens", "is_greedy", "logprobs", "bytes", "truncated"}
OUT |= {"best", "best_per_character", "best_per_byte", "acc", "acc_norm", "acc_bytes"}
BLOCK = 1024  # continuations that are sorted by length, scored and written at a time


class Row(NamedTuple):
    line: int
    given: dict
    form: str
    pairs: list
    truncated: int = 0  # tokens of context
    error: str | None = None

    @property
    def kept(self) -> dict:
        return {k: v for k, v in self.given.items() if k not in (*FORMS, "context", "context_ids")}


def blocks(rows: Iterable[tuple[int, dict]], found, longest: int, truncate: bool) -> Iterator[list[Row]]:
    """About BLOCK pairs at a time.

    Args:
      rows: as row_files.line_rows gives them.
      found: the weights.Weights that will score them.
      longest: positions that the model may see.
      truncate: whether a context too long loses its beginning; else it is an error of its row.
    """
    block, pairs = [], 0
    for number, given in rows:
        form = ""
        try:
            if isinstance(given, NoRow):
                raise DataError(given["error"])
            form = kind(given)
            made, truncated = encoded(given, form, found, longest, truncate)
            block.append(Row(number, given, form, made, truncated))
            pairs += len(made)
        except DataError as e:
            kept = {k: v for k, v in given.items() if k not in OUT}
            block.append(Row(number, kept, form, [], error=str(e)))
        if pairs >= BLOCK or len(block) >= BLOCK:
            yield block
            block, pairs = [], 0
    if block:
        yield block


def kind(row: dict) -> str:
    """Which of FORMS, its keys of the right types."""
    forms = [key for key in FORMS if key in row]
    if len(forms) != 1:
        found = f"both {forms[0]!r} and {forms[1]!r}" if forms else f"the keys {[*row]!r:.100}"
        raise DataError(f"{found}, expected one of {', '.join(map(repr, FORMS))}")
    (form,) = forms
    wanted = {"text": {}, "continuation_ids": {"context_ids": list}}.get(form, {"context": str})
    if odd := {"context", "context_ids"} & set(row) - set(wanted):
        raise DataError(f"the key {min(odd)!r} is not for a row with {form!r}; remove it, or name it otherwise")
    for key, type_ in (wanted | {form: list if form in ("choices", "continuation_ids") else str}).items():
        if key not in row:
            raise DataError(f"no key {key!r}, which a row with {form!r} needs")
        if not isinstance(row[key], type_):
            raise DataError(f"{key!r} is {row[key]!r:.60}, expected {'a list' if type_ is list else 'text'}")
    for text in row["choices"] if form == "choices" else [row[form]]:
        if not isinstance(text, list if form == "continuation_ids" else str) or not text:
            raise DataError(f"{form!r} has {text!r:.60}, expected text" if form == "choices" else f"{form!r} is empty")
    if form == "choices":
        if not row[form]:
            raise DataError("'choices' is empty, expected a list of texts")
        gold, count = row.get("gold", 0), len(row[form])
        if type(gold) is not int or not 0 <= gold < count:
            raise DataError(f"'gold' is {gold!r:.60}, expected the number of a choice, 0 to {count - 1}")
    if taken := OUT & set(row):
        raise DataError(f"the key {min(taken)!r} is one that results have; give it another name")
    return form


def encoded(row: dict, form: str, found, longest: int, truncate: bool) -> tuple[list, int]:
    """The pairs of ids to score, and how many tokens of context are left out: of choices, for the longest one."""
    from smoljax import score

    c, words = found.config, found.tokenizer
    if words is None and form != "continuation_ids":
        raise UsageError(f"{found.source} has no tokenizer.json, which text needs; copy the model's into the folder")
    prefix = found.prefix
    if form == "text":
        pairs = score.windows(score.encode(words, row["text"]), prefix, longest)
    elif form == "continuation_ids":
        pairs = [(row["context_ids"] or [prefix], row["continuation_ids"])]
    else:
        texts = row["choices"] if form == "choices" else [row["continuation"]]
        pairs = [score.encode_pair(words, row["context"], text, prefix) for text in texts]
    truncated = 0
    for i, (context, continuation) in enumerate(pairs):
        if prefix is None and context[:1] == [None]:
            raise DataError("an empty context needs the bos_token_id that the model's config lacks; give a context")
        beyond = len(context) + len(continuation) - 1 - longest
        if truncate and 0 < beyond < len(context):
            pairs[i], truncated = (context[beyond:], continuation), max(truncated, beyond)
        score.check(pairs[i], c.vocab_size, longest)
    return pairs, truncated
