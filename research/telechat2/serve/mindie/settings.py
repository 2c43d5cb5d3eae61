"""What the files say that are no code: the YAML, config.json and its like, the values for MindIE's own."""

import json
from pathlib import Path

import yaml

from research.telechat2.common.errors import UsageError
from research.telechat2.config.sampling import SAMPLING
from research.telechat2.config.sections import section_of
from research.telechat2.text.chat import conversation_text, render
from research.telechat2.text.jinja_template import chat_template

ENTRY = "telechat_mindie"  # the file that MindFormers loads
CONFIG, MODEL, TOKENIZER = CLASSES = [
    "MindIETelechatConfig",
    "MindIETelechatForCausalLM",
    "MindIETelechatTokenizer",
]
MINDIE_FOLDER = "/usr/local/Ascend/mindie/latest/mindie-service"
QUESTION = "生抽与老抽的区别？"
# of service_config, for DYNAMIC_NTK
_SWAPPING = """\
maxPreemptCount must be 0: a request that MindIE swaps to the host comes back in other blocks, and with
DYNAMIC_NTK its rotary factor is known by its first block.

"""


def check_predict_yaml(config: dict, yaml_file: Path) -> None:
    """UsageError for a YAML that describes no prediction with a cache."""
    model_config = section_of(config, "model.model_config")
    if not model_config:
        raise UsageError(f"{yaml_file} has no section model.model_config; use a predict YAML.")
    if model_config.get("type", "TelechatConfig") not in ("TelechatConfig", CONFIG):
        found = model_config["type"]
        raise UsageError(f"{yaml_file}: model.model_config.type is {found}; use one with TelechatConfig.")
    if config.get("use_legacy") is False:
        raise UsageError(f"{yaml_file}: use_legacy is False; set it to True.")
    for key in ("use_past", "is_dynamic"):
        if model_config.get(key, key == "is_dynamic") is not True:
            raise UsageError(
                f"{yaml_file}: model.model_config.{key} is {model_config.get(key, False)}, but MindIE serves "
                f"from a paged cache, in batches of every size; set it to True, or use a predict YAML."
            )
    if section_of(config, "context.jit_config").get("jit_level") == "O1":
        raise UsageError(f"{yaml_file}: context.jit_config.jit_level is O1; prediction needs O0.")


def served_yaml(config: dict, checkpoint: str, vocab_file: str, world_size: int) -> dict:
    """A predict YAML, with its bases, as MindFormers' ModelRunner reads it: our classes by ``auto_map``.

    ``checkpoint``, ``vocab_file``: absolute paths, or "" where they are not known yet.
    """
    served = json.loads(json.dumps(config))
    model, tokenizer = served["model"], served.setdefault("processor", {}).setdefault("tokenizer", {})
    classes = ((model["model_config"], CONFIG), (model.setdefault("arch", {}), MODEL), (tokenizer, TOKENIZER))
    for part, kind in classes:
        part.pop("auto_register", None)
        part["type"] = kind
    model["model_config"]["auto_map"] = {
        "AutoConfig": f"{ENTRY}.{CONFIG}",
        "AutoModel": f"{ENTRY}.{MODEL}",
        "AutoTokenizer": [f"{ENTRY}.{TOKENIZER}", None],
    }
    tokenizer["vocab_file"] = vocab_file
    served |= {"run_mode": "predict", "load_checkpoint": checkpoint, "auto_trans_ckpt": False}
    served["use_parallel"] = world_size > 1
    if world_size > 1:
        served.setdefault("parallel", {})["parallel_mode"] = "STAND_ALONE"
        served["parallel_config"] = parallel_plan(served, world_size)
    return served


def parallel_plan(config: dict, world_size: int) -> dict:
    """The YAML's section ``parallel_config`` for so many NPUs, which share every layer."""
    plan = {"data_parallel": 1, "model_parallel": world_size, "pipeline_stage": 1, "vocab_emb_dp": False}
    return section_of(config, "parallel_config") | plan


def yaml_text(content: dict) -> str:
    """YAML of a dictionary, in its order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def json_text(content: dict) -> str:
    """JSON of a dictionary, in its order, to read."""
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def config_json(model_config, served: dict) -> dict:
    """What MindIE and other tools read of the model: every effective setting, and the YAML's moe_config."""
    content = model_config.to_dict() | {"parallel_config": None}
    content.pop("moe_config", None)
    content["moe_config"] = section_of(served, "moe_config") or None
    return {name: value for name, value in content.items() if value is not None} | {
        "architectures": [MODEL],
        "model_type": model_config.model_type,
        "torch_dtype": content["compute_dtype"],  # MindIE reads this name, model_type and vocab_size
        "auto_map": served["model"]["model_config"]["auto_map"],
    }


def tokenizer_config(tokenizer: dict, prompt_format: str) -> dict:
    """tokenizer_config.json, which MindFormers prefers to the YAML's section."""
    own = {name: value for name, value in tokenizer.items() if name not in ("type", "vocab_file")}
    return own | {
        "tokenizer_class": TOKENIZER,
        "prompt_format": prompt_format,
        "chat_template": chat_template(prompt_format),
    }


def generation_config(model_config) -> dict:
    """generation_config.json, whose top_k MindIE reads."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", *SAMPLING)
    return {name: getattr(model_config, name) for name in names}


def service_config(model_config, folder: Path, *, world_size: int, npu_mem_size: int) -> dict:
    """The values for MindIE's own conf/config.json, where they stand in it."""
    length = model_config.seq_length
    swapping = {"maxPreemptCount": 0} if model_config.extend_method == "DYNAMIC_NTK" else {}
    return {
        "ServerConfig": {"httpsEnabled": False},
        "BackendConfig": {
            "npuDeviceIds": [list(range(world_size))],
            "ModelDeployConfig": {
                "maxSeqLen": length,
                "maxInputTokenLen": length * 3 // 4,
                "ModelConfig": [
                    {
                        "modelName": folder.name,
                        "modelWeightPath": str(folder),
                        "worldSize": world_size,
                        "npuMemSize": npu_mem_size,
                        "backendType": "ms",
                        "trustRemoteCode": False,
                    }
                ],
            },
            "ScheduleConfig": {
                "templateType": "Standard",
                "cacheBlockSize": model_config.block_size,
                "maxPrefillTokens": max(length, 8192),
                "maxIterTimes": length,
                **swapping,
            },
        },
    }


def instructions(service: dict, prompt_format: str) -> str:
    """What is left to do, to read and to type."""
    deployed = service["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    message = [{"role": "user", "content": QUESTION}]
    prompt = conversation_text(render(message, prompt_format=prompt_format, add_generation_prompt=True))
    parameters = {"do_sample": False, "max_new_tokens": 512}
    raw = {"inputs": prompt, "parameters": parameters, "stream": False}
    swapping = "maxPreemptCount" in service["BackendConfig"]["ScheduleConfig"]
    chat = {"model": deployed["modelName"], "messages": message, "max_tokens": 512, "stream": False}
    return f"""\
Set these in {MINDIE_FOLDER}/conf/config.json, each where it stands there:

{json.dumps(service, indent=4, ensure_ascii=False)}

{_SWAPPING if swapping else ""}Start the service; it runs when mindie.log says "Daemon start success!":

cd {MINDIE_FOLDER}
./bin/mindieservice_daemon > mindie.log 2>&1 &
tail -f mindie.log

Ask; /generate takes the text as it is, markers of the prompt format included:

{_curl(chat, "/v1/chat/completions")}
{_curl(raw, "/generate")}
"""


def _curl(body: dict, path: str) -> str:
    text = json.dumps(body, ensure_ascii=False)
    return (
        'curl -w "\\ntime_total=%{time_total}\\n" -H "Accept: application/json" '
        f"-H \"Content-type: application/json\" -X POST -d '{text}' http://127.0.0.1:1025{path}"
    )
