"""The record of the prompt format: found from where MindFormers writes checkpoints, never contradicted."""

import json

import pytest
from refusal import refused

from research.telechat2.common.files import write_json
from research.telechat2.text import prompt_format


def test_found_from_a_checkpoint_file_up_to_two_parents(tmp_path):
    rank = tmp_path / "output" / "checkpoint" / "rank_0"
    rank.mkdir(parents=True)
    (rank / "x.safetensors").touch()
    assert prompt_format.find(rank / "x.safetensors") is None
    prompt_format.write(tmp_path, "chat")
    assert prompt_format.find(rank) is None  # three levels up is another project
    prompt_format.write(tmp_path / "output", "plain")
    assert prompt_format.find(rank / "x.safetensors") == "plain"
    assert prompt_format.find(rank) == "plain"
    assert json.loads((tmp_path / "output" / "prompt_format.json").read_text()) == {"prompt_format": "plain"}


def test_a_folder_of_another_model_inherits_nothing(tmp_path):
    """Only the folders that a run makes within its output belong to it."""
    prompt_format.write(tmp_path, "plain")
    for name in ("7b", "iteration_best", "checkpoints"):
        (tmp_path / name).mkdir()
        assert prompt_format.find(tmp_path / name / "model.safetensors") is None
    for name in ("checkpoint", "iteration_00000020", "rank_3"):
        (tmp_path / name).mkdir()
        assert prompt_format.find(tmp_path / name) == "plain"
        assert prompt_format.record_of(tmp_path / name) == tmp_path / "prompt_format.json"


def test_the_nearest_record_wins(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    prompt_format.write(tmp_path, "plain")
    prompt_format.write(tmp_path / "checkpoint", "chat")
    assert prompt_format.find(tmp_path / "checkpoint" / "any.ckpt") == "chat"


def test_another_format_is_refused_and_the_same_is_fine(tmp_path):
    prompt_format.write(tmp_path, "chat")
    prompt_format.write(tmp_path, "chat")
    with refused(tmp_path / "prompt_format.json", "'chat'", "'plain'"):
        prompt_format.write(tmp_path, "plain")
    with refused("'chatml'", "chat, plain"):
        prompt_format.write(tmp_path, "chatml")
    assert [path.name for path in tmp_path.iterdir()] == ["prompt_format.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"prompt_format": "x"}', '{"prompt_format": ["chat"]}'])
def test_a_damaged_record_is_an_error(tmp_path, content):
    (tmp_path / "prompt_format.json").write_text(content)
    with refused(tmp_path / "prompt_format.json"):
        prompt_format.find(tmp_path)


def test_the_format_of_a_data_set_is_that_of_its_manifests(tmp_path):
    first, second = tmp_path / "a.mindrecord", tmp_path / "sub" / "b.mindrecord"
    second.parent.mkdir()
    assert prompt_format.of_dataset(first) is prompt_format.of_dataset(tmp_path) is None
    write_json(prompt_format.manifest_path(first), {"prompt_format": "chat"})
    assert prompt_format.of_dataset(first) == prompt_format.of_dataset(tmp_path) == "chat"
    write_json(prompt_format.manifest_path(second), {"prompt_format": "plain"})
    assert prompt_format.of_dataset(second) == "plain"
    with refused("a.mindrecord.json", "'chat'", "b.mindrecord.json", "'plain'"):
        prompt_format.of_dataset(tmp_path)


def test_training_on_data_without_a_manifest_says_that_nothing_is_recorded(tmp_path, capsys):
    from research.telechat2.run.save_checkpoint import record_prompt_format

    loader = {"dataset_dir": str(tmp_path / "a.mindrecord")}
    record_prompt_format({"train_dataset": {"data_loader": loader}})
    assert "--prompt_format" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
