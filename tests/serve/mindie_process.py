"""A process that loads folders through ModelRunner and asks them by MindIE's calls."""

import importlib.util
import json
import sys
from pathlib import Path

CACHED = 2048  # tokens, of all requests together


def load(path: str):
    """A file as a module, whatever the import path is."""
    specification = importlib.util.spec_from_file_location("self_test", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["self_test"] = module
    specification.loader.exec_module(module)
    return module


def scheduled(engine, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Two requests read at once, one while they go on, one in the blocks of the two when they have ended."""

    def whole(row) -> bool:
        return len(row.tokens) == len(prompts[rows.index(row)]) + new_tokens

    engine.free.sort()
    rows = [engine.admit(prompt, new_tokens) for prompt in prompts[:2]]
    engine.read(rows)
    for _ in range(3):
        engine.go_on(rows)
    rows.append(engine.admit(prompts[2], new_tokens))
    engine.read(rows[2:])
    while not whole(rows[0]):
        engine.go_on(rows)
    engine.finish(rows[0])
    engine.finish(rows[1])
    engine.free.sort()
    rows.append(engine.admit(prompts[3], new_tokens))
    assert set(rows[3].blocks) <= {*rows[0].blocks, *rows[1].blocks}
    engine.read(rows[3:])
    while live := [row for row in rows[2:] if not whole(row)]:
        engine.go_on(live)
    return [row.tokens[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def ask(folder: str, job: dict, self_test) -> dict:
    """What the model of a folder answers, to MindIE and by its own ``generate``."""
    from mindformers.model_runner import get_model

    tokenizer, builder = get_model(folder)
    prompts = [
        builder.make_context(0, [{"role": "user", "content": question}], chat_template_kwargs={})
        for question in job["questions"]
    ]
    engine = self_test.Engine(self_test.make_runner(folder, CACHED))
    steps = [engine.runner.warmup_step]
    engine.answer([0] * 4, 2)
    steps.append(engine.runner.warmup_step)
    answers = scheduled(engine, prompts, job["new_tokens"])
    longest = max(map(len, prompts))
    padded = [prompt + [tokenizer.pad_token_id] * (longest - len(prompt)) for prompt in prompts]
    generated = engine.runner.model.generate(
        padded, max_new_tokens=job["new_tokens"], do_sample=False, eos_token_id=[-1],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return {
        "prompts": prompts,
        "answers": answers,
        "generated": [row[len(prompt) :].tolist() for row, prompt in zip(generated, prompts, strict=True)],
        "warm_up": steps,
        "caches": [list(cache.shape) for cache in engine.runner.model.kvcache(1)],
        "model": type(engine.runner.model).__module__,
    }


def one_of_several(folder: str, rank: int, world_size: int):
    """The ModelRunner of one process of several, on CPUs where it would set up NPUs."""
    import mindspore
    from mindformers.model_runner import ModelRunner

    set_device = mindspore.set_device
    mindspore.set_device = lambda *target, **and_index: set_device("CPU")
    return ModelRunner(folder, 1 / 64, 0, 16, rank_id=rank, world_size=world_size, npu_device_ids=[rank])


def failure(folder: str, self_test) -> str:
    """How ModelRunner ends with a folder that must not load."""
    try:
        self_test.make_runner(folder, CACHED)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{folder} was loaded")


def own_modules() -> set[str]:
    """The files that the modules of this project were imported from."""
    modules = [module for name, module in sys.modules.items() if name.startswith("research.")]
    return {module.__file__ for module in modules if module.__file__}


def main() -> None:
    """Do the job of the file named, and write what was said beside it."""
    file = Path(sys.argv[1])
    job = json.loads(file.read_text())
    self_test = load(job["self_test"])
    if job["rank"] is not None:
        self_test.make_runner = lambda folder, _: one_of_several(folder, job["rank"], job["world_size"])
    said = {
        "folders": [ask(folder, job, self_test) for folder in job["folders"]],
        "broken": [failure(folder, self_test) for folder in job["broken"]],
        "code": sorted(own_modules()),
    }
    file.with_suffix(".said.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
