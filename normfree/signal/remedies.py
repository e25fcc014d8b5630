"""A verdict: a sentence on a signal, with what to do about it."""

from typing import Any


class Verdict(str):
    """Sentence on a signal.

    Attributes:
        remedy: What to do about it, in this library's terms; empty where there is nothing to be done.
        page: Page of the documents that explains it, and its section, such as "convert.md#what-is-done".
    """

    remedy: str
    page: str

    def __new__(cls, words: str, remedy: str = "", page: str = "") -> "Verdict":
        """Make one of its words."""
        verdict = super().__new__(cls, words)
        verdict.remedy = remedy
        verdict.page = page
        return verdict

    def __reduce__(self) -> tuple[Any, ...]:
        return Verdict, (str(self), self.remedy, self.page)

    @property
    def is_problem(self) -> bool:
        """True where something should be done."""
        return bool(self.remedy)
