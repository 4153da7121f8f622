"""Every architecture of transformers at a tiny size: what splaser knows of it, against the loaded model.

    python -m tests.architectures.sweep [--kinds all] [--only llama,gpt2] [--results FILE] [--table docs/models.md]

For each model type a random model of a few thousand parameters is made (`tiny.py`) and saved. Columns: `scan` (the
folder's matrices, names, types and weights are the loaded model's), `lora` (PEFT adapts exactly the chosen matrices, or
it is refused), `unfrozen` (the same for Axolotl's rule), `reduce` (one matrix of each type reduced and saved: nothing
else has changed, and it loads again), `statistics` (a reduction's see every matrix that a prediction hangs on, or leave
it whole with a reason; the inputs times the gradients that they see are the gradient of the weight), `laser` (a search
by its own answers ends, and what it wrote loads as what it scored), `factored` (so does what it wrote as factors).
`can't run` is what transformers says of text alone; the search is refused in one line then. Results are appended to a
file as they come; types that are in it are not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from tests.architectures.tiny import tiny_config
from tests.reduction.watched import unseen, watched

MOST_PARAMETERS = 20_000_000
ROWS = [{"prompt": f"w1 w{place}", "chosen": f"w{place} w2", "rejected": "w3 w4 w5"} for place in range(6, 14)]
IDS = torch.tensor([[4, 5, 6, 7, 30, 31, 4, 9, 12, 50, 51, 52]])
COLUMNS = ("scan", "lora", "unfrozen", "reduce", "statistics", "laser", "factored")


def model_types(kinds: str) -> list[str]:
    """The model types of transformers' own mappings: causal language models, multimodal ones, or all."""
    from transformers.models.auto import modeling_auto

    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    multimodal = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return sorted({"causal": causal, "multimodal": multimodal, "all": causal | multimodal}[kinds])


def run(kind: str) -> dict[str, str]:
    """What holds for one architecture: each column `ok`, or why not."""
    from splaser_plugin.errors import SplaserError

    model, failure = _built(kind)
    if model is None:
        return {"built": f"no: {failure}"}
    found = {"built": "ok"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return {"built": f"no: can't be saved: {type(error).__name__}: {str(error)[:100]}"}
        _, told = loader(model.config).from_pretrained(folder, output_loading_info=True)
        if lost := sorted(told["missing_keys"]):
            return {"built": f"no: transformers finds {len(lost)} of its weights no more in what it saved: {lost[0]}"}
        checks = _scan, _lora, _unfrozen, _reduce, _statistics, _laser, _factored
        for column, check in zip(COLUMNS, checks, strict=True):
            try:
                found[column] = check(folder)
            except SplaserError as error:
                line = str(error)
                found[column] = f"refused: {line[:160]}" if "\n" not in line else f"several lines: {line[:160]!r}"
            except Exception as error:
                found[column] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            if failure and column in ("statistics", "laser", "factored") and found[column].startswith("refused: "):
                found[column] = f"can't run: {failure}"
    return {column: value.replace(str(folder), "the folder") for column, value in found.items()}


def _built(kind: str) -> tuple[Any, str]:
    """The first model of the type's tiny configurations that runs, else the first; and why it can't run, or is none."""
    from splaser_plugin.checkpoints.skeleton import empty_model

    first, reasons = None, []
    for filled in (False, True):
        torch.manual_seed(0)
        try:
            config = tiny_config(kind, filled)
            empty = empty_model(config, Path(kind))
            if sum(parameter.numel() for parameter in empty.parameters()) > MOST_PARAMETERS:
                raise ValueError("its default sizes have other names than the usual")
            model = loader(config).from_config(config).eval()
        except Exception as error:
            reasons.append(_reason(error.__cause__ or error))
            continue
        failure = _fails(model)
        if not failure:
            return model, ""
        first = first or (model, failure)
    return first or (None, reasons[0])


def loader(config: Any) -> Any:
    """The auto class that answers prompts; of what none of them makes a model, the one that does."""
    from splaser_plugin.checkpoints.skeleton import answering_class, auto_class, mapping_of

    kind = answering_class(config)
    return kind if type(config) in mapping_of(kind) else auto_class(config)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _fails(model: Any) -> str:
    """Why the model can't run at this size; empty where it can."""
    try:
        with torch.no_grad():
            _ = model(input_ids=torch.tensor([[4, 5, 6]])).logits
    except Exception as error:
        return _reason(error)
    return ""


def _loaded(folder: Path) -> Any:
    from transformers import AutoConfig

    return loader(AutoConfig.from_pretrained(folder)).from_pretrained(folder)


def _scan(folder: Path) -> str:
    from splaser_plugin.checkpoints.checkpoint import open_checkpoint
    from splaser_plugin.weights.matrices import model_matrices
    from splaser_plugin.weights.stored import StoredWeights

    stored = StoredWeights(open_checkpoint(folder))
    if stored.note:
        return f"names {stored.note}"
    model = _loaded(folder)
    matrices = stored.matrices(towers=True)[0]
    live = {matrix.name: matrix for matrix in model_matrices(model, towers=True)[0]}
    if {matrix.name: matrix for matrix in matrices} != live:
        names = {matrix.name for matrix in matrices} ^ live.keys()
        return f"differs from the loaded model in {len(names)} names: {min(names, default='types or shapes')}"
    if any(not matrix.type for matrix in matrices):
        return "an empty type"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for matrix, weight in stored.stream(matrices, matrices):
        if not torch.equal(weight, matrix.view(parameters[matrix.parameter])):
            return f"other weights in {matrix.name}"
    return "ok"


def _selection(folder: Path) -> Any:
    from splaser_plugin import scan
    from splaser_plugin.config.stages import SelectConfig
    from splaser_plugin.scanning.selection import choose

    return choose(scan(folder), SelectConfig(top=1))


def _lora(folder: Path) -> str:
    from peft import get_peft_model

    from splaser_plugin.integrations.peft import adapted_modules, lora_config

    selection = _selection(folder)
    config = lora_config(selection, rank=2, task_type="CAUSAL_LM")
    adapted = set(adapted_modules(get_peft_model(_loaded(folder), config)))
    return "ok" if adapted == set(selection.names) else f"silently others: {min(adapted ^ set(selection.names))}"


def _unfrozen(folder: Path) -> str:
    from splaser_plugin.integrations.check import check_unfrozen, empty_model_of
    from splaser_plugin.integrations.configs.axolotl import unfrozen_patterns

    selection = _selection(folder)
    check_unfrozen(selection, str(folder), empty_model_of(str(folder)), unfrozen_patterns(selection))
    return "ok"


def _reduce(folder: Path) -> str:
    from splaser_plugin.weights.in_memory import Weights

    model = _loaded(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = Weights(model)
    by_type = {matrix.type: matrix for matrix in weights.matrices()[0] if min(matrix.shape) > 1}
    for matrix in by_type.values():
        weights.reduce(matrix, 1)
    again = folder.parent / "reduced"
    model.save_pretrained(again)
    after = _loaded(again).state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    reduced = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expected = {matrix.parameter for matrix in by_type.values()} & reduced
    if changed != expected:
        return f"after loading again {min(changed ^ expected)} is another"
    return "ok"


def _statistics(folder: Path) -> str:
    from splaser_plugin.errors import ModelError
    from splaser_plugin.reduction.calibration import Row
    from splaser_plugin.reduction.moments import measure
    from splaser_plugin.weights.in_memory import Weights
    from splaser_plugin.weights.matrices import Skipped

    model = _loaded(folder).eval()
    if reason := _fails(model):
        raise ModelError(reason)
    weights = Weights(model)
    matrices = weights.matrices()[0]
    found = {matrix.name: one for matrix, one in measure(weights, matrices, [Row(tuple(row)) for row in IDS.tolist()])}
    whole = {name: one.reason for name, one in found.items() if isinstance(one, Skipped)}
    passed_over = whole if whole.keys() == found.keys() else unseen(weights, watched(weights, matrices, IDS)[0], IDS)
    for name in passed_over:
        return f"left whole: {name}: {whole[name]}" if name in whole else f"not all products of {name} are seen"
    return "ok"


def _laser(folder: Path) -> str:
    from splaser_plugin.weights.loading import load_model

    result = _searched(folder, folder.parent / "lasered", "dense")
    before, scored = _loaded(folder).state_dict(), result.model.state_dict()
    after = load_model(folder.parent / "lasered", device="cpu")[0].state_dict()
    if after.keys() != before.keys():
        return f"after loading again {min(after.keys() ^ before.keys())} is missing or new"
    for name, tensor in after.items():
        if not torch.equal(tensor, scored[name]):
            return f"after loading again {name} is another"
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    return "ok" if len(changed) == len(result.kept) == 1 else f"{len(changed)} changed of {len(result.kept)} kept"


def _factored(folder: Path) -> str:
    from splaser_plugin.weights.loading import load_model

    result = _searched(folder, folder.parent / "factored", "factored")
    model, _ = load_model(folder.parent / "factored", device="cpu")
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        factored, scored = model(input_ids=ids).logits, result.model(input_ids=ids).logits
    error = ((factored - scored).norm() / scored.norm()).item()
    return "ok" if error < 1e-4 else f"the factors' logits are off by {error:.0e}"


def _searched(folder: Path, output: Path, save: str) -> Any:
    """A search that keeps the one candidate that it tries, whatever it scores."""
    from splaser_plugin import LaserConfig, laser

    _tokenizer().save_pretrained(folder)
    config = LaserConfig(
        embedder="self", max_new_tokens=3, candidates=1, ranks="0.3", accept="harmless", tolerance=5, save=save,
        device="cpu",
    )  # fmt: skip
    return laser(folder, ROWS, config=config, output=output)


def _tokenizer() -> Any:
    """Of words, w0 to w99."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["pad", "bos", "eos", "unk", *(f"w{place}" for place in range(100))]
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="unk"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="pad", bos_token="bos", eos_token="eos", unk_token="unk"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}w90 {{ m['content'] }} eos {% endfor %}{% if add_generation_prompt %}w90 {% endif %}"
    )
    return tokenizer


def table(results: dict[str, dict[str, str]]) -> str:
    """The results as a Markdown table, with counts above it."""
    built = {kind: result for kind, result in results.items() if result["built"] == "ok"}
    counts = {column: Counter(_word(result.get(column, "")) for result in built.values()) for column in COLUMNS}
    lines = [
        "# Architectures",
        "",
        "Made by `make test-architectures`, with the installed transformers: random models of a tiny size. What",
        "the columns say stands in `tests/architectures/sweep.py`. `can't run` is what transformers itself says when",
        "such a model gets text and nothing else; splaser refuses to search it, in one line.",
        "",
        f"{len(results)} model types, {len(built)} built.",
        "",
    ]
    lines += [
        f"- {column}: {', '.join(f'{n} {word}' for word, n in counts[column].most_common())}" for column in COLUMNS
    ]
    lines += ["", f"| type | {' | '.join(COLUMNS)} |", "|" + " --- |" * (len(COLUMNS) + 1)]
    lines += [
        f"| {kind} | {' | '.join(_cell(result.get(column, '')) for column in COLUMNS)} |"
        for kind, result in built.items()
    ]
    lines += ["", "Not built, with what transformers says of the type's tiny configuration:", ""]
    others = {kind: result for kind, result in results.items() if kind not in built}
    lines += [f"- {kind}: {_cell(result['built'].removeprefix('no: '))}" for kind, result in others.items()]
    return "\n".join(lines) + "\n"


def _word(value: str) -> str:
    return (
        value
        if value == "ok"
        else next((word for word in ("refused", "can't run", "left whole") if value.startswith(word)), "not")
    )


def _cell(value: str) -> str:
    return value.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description="Every architecture of transformers at a tiny size.")
    parser.add_argument("--kinds", choices=("causal", "multimodal", "all"), default="all")
    parser.add_argument("--only", default="", help="these model types, separated by commas")
    parser.add_argument("--results", type=Path, default=Path(".cache/architectures.jsonl"), help="appended to")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    kinds = arguments.only.split(",") if arguments.only else model_types(arguments.kinds)
    results: dict[str, dict[str, str]] = {}
    if arguments.results.is_file():
        rows = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
        results = {row.pop("type"): row for row in rows}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        if kind not in results:
            results[kind] = run(kind)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"type": kind, **results[kind]}) + "\n")
            print(kind, results[kind], file=sys.stderr, flush=True)
    text = table({kind: results[kind] for kind in kinds})
    print(text)
    if arguments.table:
        arguments.table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
