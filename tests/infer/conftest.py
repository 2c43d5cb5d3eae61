"""The one compiled model that the tests of prediction share."""

from dataclasses import replace
from pathlib import Path

import pytest
from model_fixtures import RandomModel
from predict_model import END, NEW_TOKENS, SIZES, write_yaml

from research.telechat2.infer.loading import load_predictor
from research.telechat2.infer.predictor import Predictor


@pytest.fixture(scope="session")
def random(tmp_path_factory) -> RandomModel:
    return RandomModel(tmp_path_factory.mktemp("random"), seed=5, **SIZES)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    return write_yaml(tmp_path_factory.mktemp("config") / "predict.yaml")


@pytest.fixture(scope="session")
def predictor(random, small_vocab, config_file) -> Predictor:
    """The one compiled model; a test changes it through ``limits`` and ``ends_with`` only."""
    return load_predictor(
        config_file, small_vocab, random.weights, batch_size=4, generation={"max_new_tokens": NEW_TOKENS}
    )


@pytest.fixture
def limits(predictor):
    """Change the predictor's limits for one test: ``limits(max_length=…, max_new_tokens=…)``."""
    before = predictor.limits, dict(predictor.generation)

    def change(**changes):
        lengths = {name: changes.pop(name) for name in ("max_length", "max_new_tokens") if name in changes}
        predictor.limits = replace(predictor.limits, **lengths)
        predictor.generation = predictor.generation | changes
        return predictor

    yield change
    predictor.limits, predictor.generation = before


@pytest.fixture
def ends_with(predictor):
    """Let another token end answers for one test: a random model hardly ever says ``<_end>``."""

    def change(token: int):
        predictor.model.config.eos_token_id = token

    yield change
    predictor.model.config.eos_token_id = END
