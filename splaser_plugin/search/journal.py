"""What an unfinished laser run has found, kept in its output folder, so that the same command can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from splaser_plugin.distributed import gather, in_main, is_main
from splaser_plugin.errors import OutputError, ScoreError
from splaser_plugin.files.locked_file import write_all
from splaser_plugin.files.output import JOURNAL, hold, let_go
from splaser_plugin.generation.generator import Answer
from splaser_plugin.progress import measured
from splaser_plugin.scoring.scores import Scorer, Scores

SCHEMA = "splaser.laser-journal/1"
START = f'{{"schema": "{SCHEMA}"'.encode()
BASE = "base model"

_Result = TypeVar("_Result")


class Journal:
    """Remembers nothing: each thing is done when it is asked for."""

    subject = BASE
    """What is being measured, for the records; it begins with BASE for the model as it came."""

    def begin(self, run: Mapping[str, Any]) -> int:
        """Tell what the results depend on. Returns how many results an earlier, unfinished run has left."""
        return 0

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
        self.path = folder / JOURNAL
        self.finished = 0
        """Results in the file."""
        self._anew = anew
        self._began = False
        self._left: Iterator[tuple[int, dict[str, Any]]] = iter(())
        self._descriptor: int | None = None
        in_main(self._open)

    def begin(self, run: Mapping[str, Any]) -> int:
        """See `Journal.begin`. Raises OutputError when what was left is of another run, and tells the difference."""
        left = gather(lambda: self._resume(dict(run)) if is_main() else [])
        self._left = iter(left)
        self.finished = len(left)
        self._began = True
        return len(left)

    def once(
        self,
        what: str,
        asked: Sequence[int],
        work: Callable[[], _Result],
        pack: Callable[[_Result], Any],
        unpack: Callable[[Any], _Result],
    ) -> _Result:
        name = {"subject": self.subject, "what": what, "asked": list(asked)}
        line, record = next(self._left, (0, None))
        if record is None:
            return self._work(name, work, pack)
        try:
            if name != {key: record[key] for key in name}:
                raise OutputError(
                    f"{self.path}, line {line}: has {record['what']} of {record['subject']}, where {what} of "
                    f"{self.subject} was expected. Move it away to start anew."
                )
            if "failed" in record:
                raise ScoreError(str(record["failed"]))
            return unpack(record["result"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(line) from error

    def _work(self, name: dict[str, Any], work: Callable[[], _Result], pack: Callable[[_Result], Any]) -> _Result:
        try:
            result = work()
        except ScoreError as error:
            failed = {**name, "failed": str(error)}
            if not self.subject.startswith(BASE):  # that ends the run, and the next one tries again
                in_main(lambda: self._append(failed))
                self.finished += 1
            raise
        in_main(lambda: self._append({**name, "result": pack(result)}))
        self.finished += 1
        return result

    def close(self) -> None:
        """Let go of the folder. The journal stays, unless nothing stands in it."""
        if self._descriptor is None:
            return
        if self._began and self.finished == 0:
            os.ftruncate(self._descriptor, 0)
        let_go(self.path.parent, self._descriptor)
        self._descriptor = None

    def _open(self) -> None:
        self._descriptor = hold(self.path.parent)

    def _resume(self, run: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        """Line number and content of each result that was left. The file ends in a whole line afterwards."""
        descriptor = self._descriptor
        if descriptor is None:
            raise OutputError(f"{self.path}: is closed. Make another LaserJournal.")
        content = self.path.read_bytes()
        if content[: len(START)] != START[: len(content)]:
            raise OutputError(f"{self.path}: is in the journal's place, but none. Move it away.")
        whole = content.rpartition(b"\n")[0]
        lines = whole.split(b"\n") if whole else []
        try:
            os.ftruncate(descriptor, len(whole) + bool(whole))
            if not lines or self._is_of_another_run(lines[0], run):
                os.ftruncate(descriptor, 0)
                self._append({"schema": SCHEMA, "run": run})
                return []
        except OSError as error:
            raise self._cant("be written", error) from error
        left = []
        for number, line in enumerate(lines[1:], start=2):
            record = _parse(line)
            if record is None:
                raise self._damaged(number)
            left.append((number, record))
        return left

    def _is_of_another_run(self, line: bytes, run: dict[str, Any]) -> bool:
        head = _parse(line) or {}
        differences = _differences(head.get("run"), json.loads(json.dumps(run)))
        if differences and not self._anew:
            raise OutputError(
                f"{self.path}: was left by another run: {'; '.join(differences)}. Give the same model, pairs and "
                "options to go on with it, choose another --output, or pass --overwrite to start anew."
            )
        return bool(differences)

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._descriptor is None:
            return
        try:
            write_all(self._descriptor, json.dumps(record, allow_nan=False).encode() + b"\n")
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._cant("be written", error) from error

    def _damaged(self, line: int) -> OutputError:
        return OutputError(
            f"{self.path}, line {line}: is damaged, so the run can't go on from there. Delete that line and all "
            "after it to go on from before, or move it away to start anew."
        )

    def _cant(self, what: str, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: can't {what} ({error.strerror or error}). Make room there, or choose another --output."
        )


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
    answers = [
        {"text": answer.text, "tokens": list(answer.tokens), "is_cut": answer.is_cut} for answer in scores.answers
    ]
    return {"values": list(scores.values), "answers": answers}


def _unpacked(items: Sequence[int], stored: Any) -> Scores:
    values = tuple(float(value) for value in stored["values"])
    answers = tuple(
        Answer(str(answer["text"]), tuple(map(int, answer["tokens"])), bool(answer["is_cut"]))
        for answer in stored["answers"]
    )
    if len(values) != len(items) or len(answers) not in (0, len(items)):
        raise ValueError("not one value for each item")
    measured(len(items))
    return Scores(tuple(items), values, answers)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        stored = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return stored if isinstance(stored, dict) else None


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """In which parts two nested mappings differ, for people."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now})
        return [found for key in keys for found in _differences(before.get(key), now.get(key), f"{name} {key}".strip())]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]
