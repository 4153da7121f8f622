"""What an unfinished laser run has found, kept in its output folder, so that the same command can go on."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from splaser_plugin.distributed import gather, in_main, is_main, process_index
from splaser_plugin.errors import OutputError, ScoreError
from splaser_plugin.files.journal import JournalFile, parsed
from splaser_plugin.files.output import JOURNAL, STATISTICS, hold, let_go
from splaser_plugin.files.validation import InvalidRecordError, Number, Whole, validated
from splaser_plugin.generation.generator import Answer
from splaser_plugin.progress import count_items
from splaser_plugin.scoring.scores import Scorer, Scores

SCHEMA = "splaser.laser-journal/1"
BASE = "base model"

_Result = TypeVar("_Result")


class Journal:
    """Remembers nothing: each thing is done when it is asked for."""

    def __init__(self) -> None:
        self._subject = BASE

    @property
    def statistics(self) -> Path | None:
        """Where this process keeps what it measured of matrices, for the run that goes on; None for nowhere."""
        return None

    @contextmanager
    def measuring(self, subject: str) -> Iterator[None]:
        """Inside, what is measured is `subject`, for the records; outside it is BASE, the model as it came.

        A name that begins with BASE is for that model too: without its scores there is no run.
        """
        before, self._subject = self._subject, subject
        try:
            yield
        finally:
            self._subject = before

    def begin(self, run: Mapping[str, Any]) -> int:
        """Tell what the results depend on. Returns how many results an earlier, unfinished run has left."""
        return 0

    def next_left(self) -> str | None:
        """What the next result is of that the earlier run has left; None where none is left."""
        return None

    def once(
        self,
        what: str,
        asked: Sequence[int],
        work: Callable[[], _Result],
        pack: Callable[[_Result], Any],
        unpack: Callable[[Any], _Result],
    ) -> _Result:
        """The result of `work`, as it was left by the earlier run if that came so far.

        what, asked: name the result, together with the subject. pack, unpack: to plain values and back.
        """
        return work()


class LaserJournal(Journal):
    """The journal of the run whose output will be `folder`: a line of JSON for each result, synced to disk.

    The search is a function of the scores alone, so that a run that gets its earlier scores from here takes the
    same way as before. The folder is made and nobody else can use it until `close` or the process's end.
    anew: throw away what another run has left here, instead of refusing it.
    Raises OutputError when another run is at work there, or it can't be written. Every process has to make one.
    """

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        super().__init__()
        self.path = folder / JOURNAL
        self.finished = 0
        """Results in the file."""
        self._anew = anew
        self._began = False
        self._left: deque[tuple[int, dict[str, Any]]] = deque()
        self._file = JournalFile(self.path, SCHEMA)
        in_main(self._open)

    @property
    def statistics(self) -> Path | None:
        return self.path.parent / STATISTICS / str(process_index())

    def begin(self, run: Mapping[str, Any]) -> int:
        """See `Journal.begin`. Raises OutputError when what was left is of another run, and tells the difference."""
        left = gather(lambda: self._resume(dict(run)) if is_main() else [])
        self._left = deque(left)
        self.finished = len(left)
        self._began = True
        return len(left)

    def next_left(self) -> str | None:
        """See `Journal.next_left`."""
        return str(self._left[0][1].get("what")) if self._left else None

    def once(
        self,
        what: str,
        asked: Sequence[int],
        work: Callable[[], _Result],
        pack: Callable[[_Result], Any],
        unpack: Callable[[Any], _Result],
    ) -> _Result:
        name = {"subject": self._subject, "what": what, "asked": list(asked)}
        if not self._left:
            return self._work(name, work, pack)
        line, record = self._left.popleft()
        try:
            left = validated(_Line, record)
            if name != {"subject": left.subject, "what": left.what, "asked": list(left.asked)}:
                raise OutputError(
                    f"{self.path}, line {line}: has {left.what} of {left.subject}, where {what} of {self._subject} was "
                    "expected. Move it away to start anew."
                )
            if left.failed is not None:
                raise ScoreError(left.failed)
            return unpack(record["result"])
        except (InvalidRecordError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(line) from error

    def _work(self, name: dict[str, Any], work: Callable[[], _Result], pack: Callable[[_Result], Any]) -> _Result:
        try:
            result = work()
        except ScoreError as error:
            failed = {**name, "failed": str(error)}
            if not self._subject.startswith(BASE):  # that ends the run, and the next one tries again
                in_main(lambda: self._append(failed))
                self.finished += 1
            raise
        in_main(lambda: self._append({**name, "result": pack(result)}))
        self.finished += 1
        return result

    def close(self) -> None:
        """Let go of the folder. The journal stays, unless the run has found nothing yet."""
        if self._file.descriptor is None:
            return
        if self._began and self.finished == 0 and not (self.path.parent / STATISTICS).is_dir():
            self._file.cut(0)
        let_go(self.path.parent, self._file.descriptor)
        self._file.descriptor = None

    def _open(self) -> None:
        self._file.descriptor = hold(self.path.parent)

    def _resume(self, run: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        """Line number and content of each result that was left. The file ends in a whole line afterwards."""
        whole = [(number, line) for number, line in self._file.lines() if line.endswith(b"\n")]
        self._file.cut(sum(len(line) for _, line in whole))
        if not whole or self._is_of_another_run(whole[0][1], run):
            self._file.cut(0)
            shutil.rmtree(self.path.parent / STATISTICS, ignore_errors=True)
            self._append({"schema": SCHEMA, "run": run})
            return []
        left = []
        for number, line in whole[1:]:
            record = parsed(line)
            if record is None:
                raise self._damaged(number)
            left.append((number, record))
        return left

    def _is_of_another_run(self, line: bytes, run: dict[str, Any]) -> bool:
        head = parsed(line) or {}
        differences = _differences(head.get("run"), json.loads(json.dumps(run)))
        if differences and not self._anew:
            raise OutputError(
                f"{self.path}: was left by another run: {'; '.join(differences)}. Give the same model, pairs and "
                "options to go on with it, choose another --output, or pass --overwrite to start anew."
            )
        return bool(differences)

    def _append(self, record: Mapping[str, Any]) -> None:
        self._file.append([record], sync=True)

    def _damaged(self, line: int) -> OutputError:
        return OutputError(
            f"{self.path}, line {line}: is damaged, so the run can't go on from there. Delete that line and all "
            "after it to go on from before, or move it away to start anew."
        )


@dataclass(frozen=True)
class _Line:
    """Of what a result is, and why there is none where a candidate couldn't be scored."""

    subject: str
    what: str
    asked: tuple[Whole, ...]
    failed: str | None = None


@dataclass(frozen=True)
class _Packed:
    """Scores as they stand in a line."""

    values: tuple[Number, ...]
    answers: tuple[Answer, ...]


class RecordedScorer:
    """A scorer whose measurements go through a journal."""

    def __init__(self, scorer: Scorer, journal: Journal) -> None:
        self.scorer = scorer
        self.journal = journal
        self.name = scorer.name
        self.size = scorer.size

    def score(self, items: Sequence[int], like: Scores | None = None) -> Scores:
        return self.journal.once(
            self.name, items, lambda: self.scorer.score(items, like), _packed, lambda stored: _unpacked(items, stored)
        )


def _packed(scores: Scores) -> dict[str, Any]:
    answers = [{**asdict(answer), "tokens": list(answer.tokens)} for answer in scores.answers]
    return {"values": list(scores.values), "answers": answers}


def _unpacked(items: Sequence[int], stored: Any) -> Scores:
    packed = validated(_Packed, stored)
    if len(packed.values) != len(items) or len(packed.answers) not in (0, len(items)):
        raise ValueError("not one value for each item")
    count_items(len(items))
    return Scores(tuple(items), packed.values, packed.answers)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """In which parts two nested mappings differ, for people."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now})
        return [found for key in keys for found in _differences(before.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]
