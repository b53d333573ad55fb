"""What all benchmarks share: their rows, printed as they come and again as a table, and the roofs.

    pytest bench                           # a ratio more than 15 % below the baseline's, twice, fails its benchmark
    pytest bench -k "d256 and b32 or svd"  # some of them
    pytest bench --update-baseline         # these rows' ratios are the baseline from now on

Writes latest.json; the baseline is baseline.json.
"""

import pytest
from record import Record
from roofs import Roofs

RECORD, ROOFS = pytest.StashKey[Record](), pytest.StashKey[Roofs]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-baseline", action="store_true", help="write the measured ratios to bench/baseline.json")
    parser.addoption("--svd-disk", action="store_true", help="also fit 200,000 x 20,000 from disk: 16 GB")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = Record(config)
    config.option.showcapture = "no"  # torch.compile logs thousands of lines, which a failure would show


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Record:
    return pytestconfig.stash[RECORD]


@pytest.fixture(scope="session")
def roofs(pytestconfig: pytest.Config) -> Roofs:
    return pytestconfig.stash.setdefault(ROOFS, Roofs())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    record = config.stash[RECORD]
    if not record.rows:
        return
    terminalreporter.section("ours, peer, ratio (> 1: we are faster), share of the roof")
    for row in record.rows:
        terminalreporter.line(str(row), red=row in record.fallen)
    terminalreporter.line(record.write(config.stash[ROOFS].record() if ROOFS in config.stash else {}))
