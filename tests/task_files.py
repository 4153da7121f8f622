"""Task files of lm-evaluation-harness with local data, and what their questions are worth, computed plainly."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from tests.builders import save_rows

WORDS = ["red", "blue", "green", "white", "black", "brown", "grey", "pink"]
CHOICES = [
    {
        "question": f"Box {number} is {word}. Which colour has it?",
        "choices": [word, "a colour that nobody knows", WORDS[(number + 3) % 8]],
        "label": number % 3,
    }
    for number, word in enumerate(2 * WORDS)
]
"""Sixteen documents of the type multiple_choice."""


def save_task(folder: Path, name: str, rows: list[dict], **settings: object) -> Path:
    """A task file and the json lines that it reads."""
    data = save_rows(folder / f"{name}.jsonl", rows)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        **settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def metrics(*names: str) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def save_choices(folder: Path, name: str = "colours", rows: list[dict] = CHOICES, **settings: object) -> Path:
    kind = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    return save_task(folder, name, rows, **{**kind, "metric_list": metrics("acc", "acc_norm"), **settings})


def save_answers(folder: Path, rows: list[dict], name: str = "answers", **settings: object) -> Path:
    kind = {"output_type": "generate_until", "doc_to_target": "answer"}
    generation = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    own = {"generation_kwargs": generation, "metric_list": metrics("exact_match")}
    return save_task(folder, name, rows, **{**kind, **own, **settings})


@torch.no_grad()
def likelihoods(model, tokenizer, row: dict) -> list[float]:
    """Summed log-probability of each choice after its question, one choice at a time."""
    prompt = f"Question: {row['question']}\nAnswer:"
    start = len(tokenizer(prompt)["input_ids"])
    found = []
    for choice in row["choices"]:
        ids = torch.tensor([tokenizer(f"{prompt} {choice}")["input_ids"]])
        logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        found.append(sum(logs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1])))
    return found


def right_choices(model, tokenizer, rows: list[dict] = CHOICES) -> tuple[list[float], list[float]]:
    """acc and acc_norm of each document: whether the right choice is the likeliest, as it is and by character."""
    acc, acc_norm = [], []
    for row in rows:
        sums = likelihoods(model, tokenizer, row)
        by_character = [value / len(choice) for value, choice in zip(sums, row["choices"], strict=True)]
        acc.append(float(sums.index(max(sums)) == row["label"]))
        acc_norm.append(float(by_character.index(max(by_character)) == row["label"]))
    return acc, acc_norm


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, *, most: int = 5) -> str:
    """The likeliest token after the other, without a cache, up to a new line."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + most:
        ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode(ids[start:]):
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


def answered_rows(model, tokenizer, count: int = 12) -> list[dict]:
    """Documents of the type generate_until: every other one is answered as this model does."""
    questions = [f"Say the word number {number}." for number in range(count)]
    said = [greedy(model, tokenizer, f"Question: {question}\nAnswer:") for question in questions]
    return [
        {"question": question, "answer": answer if number % 2 else "something else"}
        for number, (question, answer) in enumerate(zip(questions, said, strict=True))
    ]
