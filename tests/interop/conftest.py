"""What the tests have in common: configurations that are tried only when one asks for all."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--all-configs", action="store_true", help="also the configurations that other ones stand for")


def pytest_configure(config):
    config.addinivalue_line("markers", "all_configs: run with --all-configs only")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all-configs"):
        return
    left_out = [item for item in items if item.get_closest_marker("all_configs")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def configurations(names, chosen):
    """Parameters of a test: the names that stand for others, and the rest, which `--all-configs` adds."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.all_configs) for name in names]
