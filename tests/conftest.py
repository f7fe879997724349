"""Fixtures that several test files share: tiny random models on disk, built once a session."""

import os
import signal
from collections.abc import Callable
from functools import cache

import pytest
import torch

from cats import smollm2
from cats.methods import METHODS
from tests import family_checkpoints, speaking_model, tiny_models, toy_method
from tests.family_checkpoints import FamilyCheckpoint
from tests.tiny_models import FAMILIES, TinyModel

torch.set_num_threads(1)
assert toy_method.Successor.name in METHODS  # a method from outside the package is in every parametrised test


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts its background jobs with SIGINT ignored; tests that interrupt must work there too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache_and_no_network(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test finds a model that the user fetched, and none fetches one, in this process or in those that it starts."""
    os.environ |= {smollm2.CACHE_VARIABLE: str(tmp_path_factory.mktemp("cache")), smollm2.OFFLINE_VARIABLE: "1"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """Family name -> a random model with adapters, on disk."""

    @cache
    def built(family: str) -> TinyModel:
        return tiny_models.build(tmp_path_factory.mktemp(family), FAMILIES[family]())

    return built


@pytest.fixture(scope="session")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A random model with adapters, a tokenizer and a chat template, on disk."""
    return speaking_model.build(tmp_path_factory.mktemp("speaking"))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyCheckpoint]:
    """Name of a row of `family_checkpoints.PUBLISHED` -> its checkpoint, on disk."""

    @cache
    def built(name: str) -> FamilyCheckpoint:
        return family_checkpoints.build(tmp_path_factory.mktemp(name), name)

    return built
