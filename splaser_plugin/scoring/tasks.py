"""Tasks of lm-evaluation-harness, by which a loaded model is measured document by document."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from splaser_plugin.checkpoints.folder import hub_errors
from splaser_plugin.data.split import Question, plain
from splaser_plugin.errors import MissingExtraError, TaskError, nearest
from splaser_plugin.files.sources import path_of
from splaser_plugin.files.text import first_line_of
from splaser_plugin.scoring.own_scorer import module_source

FEW_SHOT_SEED = 1234
"""lm-evaluation-harness's own default, so that a task has the same examples as in its published results."""
NO_FILTER = "none"
"""What lm-evaluation-harness calls answers as they are."""

Values = Mapping[str, Any]
"""Of one document: metric, with its filter where the task has one, to what it gives."""


@dataclass(frozen=True)
class Documents:
    """The first documents of a task, each with what a model is asked about it.

    The questions are made once, with the same few-shot examples for every model and at every time.
    """

    task: Any
    """lm-evaluation-harness's own."""
    name: str
    documents: tuple[Any, ...]
    requests: tuple[tuple[Any, ...], ...]
    """Of each document, its requests in their order."""
    available: int
    """How many documents the task has."""

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def means(self) -> tuple[str, ...]:
        """Its metrics that are means over its documents, by the task's own names, in the task's order."""
        from lm_eval.api.metrics import mean

        return tuple(name for name, aggregation in self.task.aggregation().items() if aggregation is mean)

    @property
    def metric(self) -> str:
        """The first of them, by which a search goes. Raises TaskError when there is none."""
        if not self.means:
            raise TaskError(
                f"task '{self.name}': none of its metrics ({', '.join(self.task.aggregation())}) is a mean over "
                "documents, so no part of them can be scored. Use another task."
            )
        return self.means[0]

    @property
    def questions(self) -> list[str]:
        """Of each document, by which documents are told apart: its text without examples, or all of it without one."""
        return [_question(self.task, document) for document in self.documents]

    @property
    def asked(self) -> list[Question]:
        """Of each document, its question; the core is the longest text of the document that the question shows."""
        found = []
        for document, whole in zip(self.documents, self.questions, strict=True):
            fields = document.values() if isinstance(document, Mapping) else ()
            shown = [text for text in fields if isinstance(text, str) and text.strip() and text.strip() in whole]
            found.append(Question(whole, max(shown, key=len, default=whole)))
        return found

    @property
    def identity(self) -> str:
        """sha256 of what is asked, of the task's settings and code, by which answers are graded, and of the version."""
        asked = [[request.arguments for request in requests] for requests in self.requests]
        settings = json.dumps(self.task.config.to_dict(keep_callable=True), default=_code, skipkeys=True)
        whole = (self.name, version("lm_eval"), settings, _code(type(self.task)), asked, self.documents)
        return hashlib.sha256(repr(whole).encode()).hexdigest()

    def part(self, places: Sequence[int]) -> Documents:
        """Some of the documents."""
        documents = tuple(self.documents[place] for place in places)
        return replace(self, documents=documents, requests=tuple(self.requests[place] for place in places))

    @property
    def summary(self) -> str:
        """One line for people."""
        shots = self.task.get_config("num_fewshot") or 0
        metrics = ", ".join(self.task.aggregation())
        return f"{self.name}: {len(self):,} of {self.available:,} documents, {shots} examples before each; {metrics}"

    def by_mean(self, values: Sequence[Values]) -> dict[str, list[float]]:
        """Metric to its number for each document, of those that are means over the documents.

        values: what each document's metrics give.
        """
        names = [name for name in values[0] if name.partition(",")[0] in self.means]
        return {name: [float(of_one[name]) for of_one in values] for name in names}

    def overall(self, metric: str, values: Sequence[Values]) -> float | None:
        """The task's own figure for all documents together; None where it isn't finite.

        Raises TaskError when the task's own code fails.
        """
        aggregation = self.task.aggregation()[metric.partition(",")[0]]
        try:
            found = float(aggregation([of_one[metric] for of_one in values]))
        except OverflowError:
            return None
        except Exception as error:  # task files may name any code
            raise TaskError(
                f"task '{self.name}': its {metric} of all documents can't be computed ({reason_of(error)}). Mend the "
                "task's file."
            ) from error
        return found if math.isfinite(found) else None

    def results(self, items: Sequence[int], responses: Mapping[int, list[Any]]) -> list[Values]:
        """What each document's requests were answered with, as the task's filters and metrics see it.

        Metrics that the task doesn't say how to aggregate are left out.
        Raises TaskError when documents have different ones, or one has none, or no number.
        """
        asked = [responses[item] for item in items]
        for filters in self.task._filters:
            filters.apply([request for requests in asked for request in requests])
        found: list[Values] = []
        for item, requests in zip(items, asked, strict=True):
            values: dict[str, Any] = {}
            for name in requests[0].filtered_resps:
                answers = [request.filtered_resps[name] for request in requests]
                metrics = self.task.process_results(self.documents[item], answers)
                end = "" if name == NO_FILTER else f",{name}"
                known = self.task.aggregation()
                values |= {f"{metric}{end}": value for metric, value in metrics.items() if metric in known}
            self._check(requests[0].doc_id, values, found[0] if found else values)
            found.append(values)
        return found

    def _check(self, document: int, values: Values, first: Values) -> None:
        """document: its number in the task. Raises TaskError; see `results`."""
        if not values or values.keys() != first.keys():
            raise TaskError(
                f"task '{self.name}': its document {document} has the metrics {list(values)}, expected "
                f"{list(first) or list(self.task.aggregation())} for each. Mend the task's file."
            )
        for metric, value in values.items():
            if metric.partition(",")[0] in self.means and not _is_finite(value):
                raise TaskError(
                    f"task '{self.name}': the {metric} of its document {document} is {value!r:.80}, expected a finite "
                    "number. Mend the task's file."
                )


def _question(task: Any, document: Any) -> str:
    try:
        text = task.doc_to_text(document)
    except Exception:  # of few-shot examples that have a template of their own
        return repr(document)
    return text if isinstance(text, str) and text.strip() else repr(document)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _code(value: Any) -> list[str]:
    """A function or class of a task's file as text: its name, and all of the module that it is in."""
    return [getattr(value, "__qualname__", repr(value)), module_source(value)]


def load_tasks(names: Sequence[str], tasks_path: str, *, count: int) -> list[Documents]:
    """The first `count` documents of each task, once; a group of tasks or a tag stands for its tasks.

    Args:
        names: Of tasks in `tasks_path`, or of those that lm-evaluation-harness has itself.
        tasks_path: Folder of the user's own task files; empty for none.
        count: Most documents of each task.

    Raises:
        MissingExtraError: lm-evaluation-harness isn't installed.
        TaskError: There is no such folder or task, or the task or its data can't be loaded.
    """
    if not names:
        return []
    if find_spec("lm_eval") is None:
        raise MissingExtraError(
            "lm-evaluation-harness isn't installed, which tasks are measured with. Install it: "
            'pip install "splaser_plugin[eval]"'
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if tasks_path and not path_of(tasks_path).is_dir():
        raise TaskError(f"--tasks-path {tasks_path}: there is no such folder. Check the path.")
    with redirect_stderr(io.StringIO()):  # its bars, and those of datasets
        loaded = {task.task_name: task for name in names for task in _load(name, tasks_path)}
        return [_documents(task, count) for task in loaded.values()]


def load_scored(names: Sequence[str], tasks_path: str, *, count: int) -> list[Documents]:
    """Tasks that a search can go by, each by itself.

    Raises:
        TaskError: As `load_tasks`, and when one is a group, has no metric that is a mean over documents, doesn't say
            whether more of it is better, or shows documents, with their answers, as examples before others.
    """
    found = []
    for name in names:
        tasks = load_tasks([name], tasks_path, count=count)
        if [task.name for task in tasks] != [name]:
            members = ", ".join(task.name for task in tasks)
            raise TaskError(f"task '{name}': it is a group. Name one of its tasks: {members:.300}.")
        _check_examples(tasks[0])
        _check_direction(tasks[0])
        found += tasks
    return found


def _check_direction(asked: Documents) -> None:
    better = asked.task.higher_is_better().get(asked.metric)
    if not isinstance(better, bool):
        raise TaskError(
            f"task '{asked.name}': it doesn't say whether more of its {asked.metric} is better. Say higher_is_better: "
            "true or false in the task's file."
        )


def _check_examples(asked: Documents) -> None:
    if not asked.task.get_config("num_fewshot"):
        return
    examples = {plain(_question(asked.task, document)) for document in asked.task.fewshot_docs() or ()}
    if examples & set(map(plain, asked.questions)):
        raise TaskError(
            f"task '{asked.name}': its few-shot examples are documents that are scored, so a search would see what is "
            "held out. Give its file another fewshot_split, or num_fewshot: 0."
        )


def _load(name: str, tasks_path: str) -> list[Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(path_of(tasks_path)), include_defaults=False) if tasks_path else None
    if manager is None or name not in manager.all_tasks:
        own = [] if manager is None else manager.all_tasks
        if manager is not None:
            _check_files(path_of(tasks_path))
        manager = _built_in()
        if name not in manager.all_tasks:
            where = f"{tasks_path} has none of that name, nor has" if tasks_path else "there is none of that name in"
            raise TaskError(
                f"task '{name}': {where} lm-evaluation-harness; {nearest(name, [*own, *manager.all_tasks])}. Check "
                "--tasks-path, or see them all: `lm-eval ls tasks`."
            )
    try:
        found = list(manager.load([name])["tasks"].values())
    except Exception as error:  # task files may name any code
        raise TaskError(f"task '{name}': it can't be loaded ({reason_of(error)}). {_advice(error)}") from error
    for task in found:
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"task '{task.task_name}': it runs code that the model writes. Use another one.")
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"task '{task.task_name}': it shows images or sound, and only text is asked here.")
    return found


@cache
def _built_in() -> Any:
    """What lm-evaluation-harness has itself: looking through its files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_files(folder: Path) -> None:
    """Raises TaskError for a file that isn't YAML: lm-evaluation-harness passes over those."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise TaskError(f"--tasks-path {path}: not valid YAML ({reason:.200}). Mend it first.") from error


def _documents(task: Any, count: int) -> Documents:
    """Raises TaskError when the task makes no questions of its documents."""
    name = task.task_name
    try:
        task.set_fewshot_seed(FEW_SHOT_SEED)
        task.build_all_requests(limit=count, rank=0, world_size=1)
        documents = tuple(document for _, document in islice(task.doc_iterator(limit=count), count))
        available = len(task.eval_docs)
    except Exception as error:  # templates and functions of task files may raise anything
        raise TaskError(f"task '{name}': no question can be made ({reason_of(error)}). {_advice(error)}") from error
    requests: list[list[Any]] = [[] for _ in documents]
    for request in task.instances:
        requests[request.doc_id].append(request)
    in_order = (tuple(sorted(of_one, key=lambda request: request.idx)) for of_one in requests)
    return Documents(task, name, documents, tuple(in_order), available)


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line_of(error):.200}"


def _advice(error: Exception) -> str:
    import datasets

    if isinstance(error, (OSError, datasets.exceptions.DatasetsError, *hub_errors())):
        return "Check data_files in the task's file, or the connection to the hub, where its data set may be."
    return "Mend the task's file."
