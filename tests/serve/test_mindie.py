"""What MindIE calls, without a folder: layouts of tokens, the tokenizer, the values to set."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor
from refusal import refused

from research.telechat2.serve.mindie.classes import (
    MindIETelechatConfig,
    MindIETelechatForCausalLM,
    MindIETelechatTokenizer,
    newest_rows,
    prompt_rows,
)
from research.telechat2.serve.mindie.settings import instructions, service_config

PROMPTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=5)


@given(PROMPTS)
def test_prompts_one_after_the_other_are_the_same_rows(prompts):
    lengths = np.array([len(prompt) for prompt in prompts])
    rows = prompt_rows(np.concatenate(prompts).reshape(1, -1), lengths)
    assert [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)] == prompts
    assert prompt_rows(rows, lengths) is rows  # what generate gives


@given(PROMPTS)
def test_one_token_of_each_row_is_found_where_the_row_ends(rows):
    lengths = np.array([len(row) for row in rows])
    newest = np.array([row[-1] for row in rows])
    for given_as in (newest.reshape(-1, 1), newest.reshape(1, -1)):
        found = newest_rows(given_as, lengths)
        assert np.take_along_axis(found, lengths[:, None] - 1, 1)[:, 0].tolist() == newest.tolist()


def test_a_prefill_that_leaves_tokens_out_is_an_error():
    with refused("3 tokens", 7, "plugin_params"):
        prompt_rows(np.ones((1, 3), int), np.array([5, 2]))


def model_of(**more) -> MindIETelechatForCausalLM:
    config = MindIETelechatConfig(
        num_blocks=32.5, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, vocab_size=64,
        seq_length=256, max_position_embedding=64, extend_method="DYNAMIC_NTK", use_past=True,
        compute_dtype="float32", checkpoint_path="weights", **more,
    )  # fmt: skip
    assert config.num_blocks == 32  # what ModelRunner counts from a part of a GB
    return MindIETelechatForCausalLM(config)


@pytest.fixture(scope="module")
def model():
    return model_of()


def steps(model, tokens, lengths, slots, tables, prefill: bool, **more) -> list[dict[str, list[int]]]:
    """The graph's inputs, flat, for all that the model runs where ModelRunner asks for one step."""
    asked = dict.fromkeys(("position_ids", "spec_mask", "q_seq_lens", "adapter_ids")) | more
    asked |= dict.fromkeys(("prefill_head_indices", "key_cache", "value_cache"))
    seen = []

    def run(model_inputs, prefill, *_, **__):
        seen.append({name: np.asarray(value).reshape(-1).tolist() for name, value in model_inputs.items()})
        return Tensor(np.zeros((len(seen[-1]["last_token"]), 64), np.float32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_incremental_infer", run)
        logits, rows = model.forward(
            input_ids=np.array(tokens), prefill=prefill, valid_length_each_example=np.array(lengths),
            block_tables=np.array(tables, np.int32), slot_mapping=np.array(slots), use_past=True,
            mindie_warm_up=True, **asked,
        )  # fmt: skip
    assert logits.shape[0] == len(rows) == len(lengths)
    return seen


def step(*args, **kwargs) -> dict[str, list[int]]:
    (found,) = steps(*args, **kwargs)
    return found


def test_inputs_of_prefill_and_decode(model):
    tables = [[5, -1], [0, 1]]
    found = step(model, [[11, 12, 21, 22, 23]], [2, 3], [80, 81, 0, 1, 2], tables, prefill=True)
    assert found["input_ids"] == [11, 12, 21, 22, 23] and found["position_ids"] == [0, 1, 0, 1, 2]
    assert found["slot_mapping"] == [80, 81, 0, 1, 2] and found["last_token"] == [1, 4]
    found = step(model, [[13], [24]], [3, 4], [82, 3], tables, prefill=False)
    assert found["input_ids"] == [13, 24] and found["position_ids"] == [2, 3]


def test_a_requests_rotary_factor_is_its_prompts_and_stays(model):
    """Whatever else is in the batch, and however much of the tables MindIE shows."""
    long = list(range(4, 60)) + list(range(4, 48))
    assert len(long) == 100
    blocks = [9, 10, 11, 12, 13, 14, 15]
    alone = step(model, [[7, 8]], [2], [48, 49], [[3, 4, -1]], prefill=True)
    assert alone["rotary_lengths"] == [16, 16]
    both = step(
        model,
        [[7, 8, *long]],
        [2, 100],
        [48, 49, *range(144, 244)],
        [[3, 4] + 5 * [-1], blocks],
        prefill=True,
    )
    assert both["rotary_lengths"] == [16] * 2 + [112] * 100
    later = step(model, [[7], [8]], [60, 101], [51, 244], [[3, 4, 5, 6] + 3 * [-1], blocks], prefill=False)
    assert later["rotary_lengths"] == [16, 112]


@pytest.mark.parametrize("by_prompt, factors", [(False, [32, 112]), (True, [30, 100])])
def test_prompts_read_in_pieces_have_the_factors_of_their_whole_lengths(by_prompt, factors):
    """Two prompts in one prefill, ``[1, T]`` as MindIE gives them, the second in the blocks from 2 on."""
    prompts = [list(range(30)), [at % 64 for at in range(7, 107)]]
    asked = (
        [prompts[0] + prompts[1]], [30, 100], [*range(30), *range(32, 132)],
        [[0, 1] + 5 * [-1], list(range(2, 9))],
    )  # fmt: skip
    model = model_of(prefill_chunk=16, extend_by_prompt=by_prompt)
    read = [{}, {}]
    found = steps(model, *asked, prefill=True)
    assert len(found) > 2
    for inputs in found:
        for slot, token, position, length in zip(
            *(inputs[name] for name in ("slot_mapping", "input_ids", "position_ids", "rotary_lengths")),
            strict=True,
        ):
            if slot >= 0:
                read[slot >= 32][position] = token
                assert slot == position + 32 * (slot >= 32) and length == factors[slot >= 32]
    assert [[row[at] for at in range(len(row))] for row in read] == prompts
    whole = step(model_of(extend_by_prompt=by_prompt), *asked, prefill=True)
    assert whole["rotary_lengths"] == [factors[0]] * 30 + [factors[1]] * 100


def test_speculative_decoding_is_refused(model):
    with refused("plugin_params"):
        step(model, [[13]], [3], [82], [[5]], prefill=False, spec_mask=np.ones((1, 1)))


# ---------------------------------------------------------------------- tokenizer
@pytest.fixture(scope="module")
def tokenizer(small_vocab):
    return MindIETelechatTokenizer(str(small_vocab), use_fast=True, trust_remote_code=False)


def test_the_tokenizer_takes_raw_text_as_mindie_asks_it(tokenizer):
    """`/generate`: markers of the text are special."""
    ids = tokenizer(["<_start><_user>你好<_bot>"], return_tensors="np")["input_ids"][0].tolist()
    assert ids == [1, 4, *tokenizer.encode_text("你好"), 5]


def test_a_conversation_is_rendered_by_the_one_renderer(tokenizer, small_tokenizer, caplog):
    from mindformers.model_runner import InputBuilder

    message = [{"role": "user", "content": "is <_end> special?"}]
    asked = {"tools": None, "enable_thinking": False}
    ids = InputBuilder(tokenizer).make_context(0, message, chat_template_kwargs=asked)
    assert ids == small_tokenizer.apply_chat_template(message, add_generation_prompt=True)
    assert ids[0] == 6 and ids[-1] == 5 and 2 not in ids
    assert [record.getMessage() for record in caplog.records] == [
        "a client's chat setting enable_thinking has no meaning for TeleChat2 and is ignored"
    ]
    InputBuilder(tokenizer).make_context(0, message, chat_template_kwargs=asked)
    assert len(caplog.records) == 1
    assert tokenizer.apply_chat_template(message, chat_template_kwargs={"tokenize": False})[0] == 6
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<_user>is <_end> special?<_bot>")


def test_the_plain_format_is_rendered_where_a_model_was_tuned_in_it(small_vocab):
    plain = MindIETelechatTokenizer(str(small_vocab), prompt_format="plain")
    ids = plain.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert ids == [1, 4, *plain.encode_text("hi"), 5]
    with refused("'chta'"):
        MindIETelechatTokenizer(str(small_vocab), prompt_format="chta")


def test_answers_are_decoded_from_arrays(tokenizer):
    ids = np.array([*tokenizer.encode_text("生抽 and 老抽"), 2])
    assert tokenizer.decode(ids, skip_special_tokens=True) == "生抽 and 老抽"


# ---------------------------------------------------------------------- values and commands
class Settings:
    seq_length, block_size, extend_method = 8192, 16, "None"


def test_the_values_for_mindies_own_config_are_the_readmes(tmp_path):
    service = service_config(Settings, tmp_path / "telechat2_7b", world_size=2, npu_mem_size=8)
    flat = dict(leaves(service))
    assert flat.items() >= {
        "modelWeightPath": str(tmp_path / "telechat2_7b"), "worldSize": 2, "backendType": "ms",
        "maxSeqLen": 8192, "maxInputTokenLen": 6144, "npuMemSize": 8, "httpsEnabled": False,
    }.items()  # fmt: skip
    assert service["BackendConfig"]["npuDeviceIds"] == [[0, 1]]
    assert flat["cacheBlockSize"] == 16


def test_requests_with_factors_of_their_own_are_not_swapped_and_it_is_said_why(tmp_path):
    """Swapped in, they would lie in other blocks, and their factors are known by the first."""

    class Dynamic(Settings):
        extend_method = "DYNAMIC_NTK"

    for config, expected in ((Dynamic, 0), (Settings, None)):
        service = service_config(config, tmp_path / "m", world_size=1, npu_mem_size=8)
        assert service["BackendConfig"]["ScheduleConfig"].get("maxPreemptCount") == expected
        said = "maxPreemptCount must be 0: a request that MindIE swaps" in instructions(service, "chat")
        assert said == (expected == 0)


def leaves(content):
    if isinstance(content, dict):
        for key, value in content.items():
            if not isinstance(value, (dict, list)):
                yield key, value
            yield from leaves(value)
    elif isinstance(content, list):
        for value in content:
            yield from leaves(value)


@pytest.mark.parametrize(
    "prompt_format, beginning", [("chat", "<_system>你是"), ("plain", "<_start><_user>生抽")]
)
def test_the_commands_to_type_send_json_in_the_models_format(tmp_path, prompt_format, beginning):
    import shlex

    service = service_config(Settings, tmp_path / "m", world_size=1, npu_mem_size=8)
    text = instructions(service, prompt_format)
    bodies = {}
    for line in text.splitlines():
        if line.startswith("curl"):
            words = shlex.split(line)
            bodies[words[-1].rsplit(":1025", 1)[1]] = json.loads(words[words.index("-d") + 1])
    assert bodies.keys() == {"/generate", "/v1/chat/completions"}
    assert bodies["/generate"]["inputs"].startswith(beginning)
    assert bodies["/generate"]["inputs"].endswith("<_user>生抽与老抽的区别？<_bot>")
    assert bodies["/v1/chat/completions"]["messages"] == [{"role": "user", "content": "生抽与老抽的区别？"}]
    assert bodies["/v1/chat/completions"]["model"] == "m"
    assert json.dumps(service, indent=4, ensure_ascii=False) in text
    assert "./bin/mindieservice_daemon" in text
