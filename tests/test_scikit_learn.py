"""StreamingSVD as scikit-learn sees it: its own checks, pipelines, searches, tables, copies in other processes."""

import pickle
import warnings
from typing import Any

import numpy as np
import pandas
import pytest
import sklearn
import sklearn.base
import sklearn.utils.estimator_checks as checks
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from svd_checks import random_rows, results

from tipl.subspace.streaming_svd import StreamingSVD

ONE_PASS = [StreamingSVD(1), StreamingSVD(0.9, center=True), StreamingSVD(1, n_oversamples=0, num_threads=2)]
TWO_PASSES = StreamingSVD(2, center=True, passes=2)

# Of two passes over the rows, none can be made where rows come once.
EXPECTED_TO_FAIL = dict.fromkeys(
    ("check_fit_score_takes_y", "check_n_features_in_after_fitting"),
    "they call partial_fit, which an estimator with passes=2 refuses, since rows that come once cannot be read twice",
)

BESIDE = (
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_global_output_transform_pandas",
)
"""Checks that scikit-learn runs on its own estimators beside those of check_estimator."""


with warnings.catch_warnings():  # while the checks are listed, scikit-learn tells that there is no BaseEstimator
    warnings.filterwarnings("ignore", ".*does not inherit from `sklearn.base.BaseEstimator`", UserWarning)
    CHECKS = [check for one in ONE_PASS for check in checks.estimator_checks_generator(one)]
    CHECKS += checks.estimator_checks_generator(TWO_PASSES, expected_failed_checks=EXPECTED_TO_FAIL, mark="xfail")


def named(value: Any) -> str:
    return repr(value) if isinstance(value, StreamingSVD) else value.func.__name__


@pytest.mark.parametrize(("estimator", "check"), CHECKS, ids=named)
def test_scikit_learn_checks_it(estimator: StreamingSVD, check: Any) -> None:
    check(estimator)


@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names")  # they pass tables after arrays
@pytest.mark.parametrize("name", BESIDE)
def test_scikit_learn_checks_its_tables(name: str) -> None:
    getattr(checks, name)("StreamingSVD", StreamingSVD(1))


def frame(rows: np.ndarray) -> pandas.DataFrame:
    names = [f"weight {i}" for i in range(rows.shape[1])]
    return pandas.DataFrame(rows, columns=names, index=[f"step {i}" for i in range(len(rows))])


@pytest.mark.parametrize("n", [30, 400])  # rows that are kept exactly, and a sketch
def test_a_table_gives_the_bits_of_its_numbers_and_its_index(n: int) -> None:
    rows = random_rows(n, 20)
    plain, table = StreamingSVD(3, center=True).fit(rows), StreamingSVD(3, center=True).fit(frame(rows))
    assert results(table) == results(plain)
    assert np.array_equal(table.transform(frame(rows)), plain.transform(rows))
    out = table.set_output(transform="pandas").transform(frame(rows))
    assert list(out.columns) == ["streamingsvd0", "streamingsvd1", "streamingsvd2"]
    assert list(out.index[:2]) == ["step 0", "step 1"]
    assert np.array_equal(out.to_numpy(), plain.transform(rows))
    assert isinstance(table.set_output(transform=None).transform(frame(rows)), pandas.DataFrame)
    assert isinstance(table.set_output(transform="default").transform(frame(rows)), np.ndarray)


def test_scikit_learns_own_setting_of_the_output_holds_where_the_estimator_has_none() -> None:
    rows = random_rows(30, 5)
    with sklearn.config_context(transform_output="pandas"):
        assert isinstance(StreamingSVD(2).fit_transform(rows), pandas.DataFrame)
        assert isinstance(StreamingSVD(2).set_output(transform="default").fit_transform(rows), np.ndarray)
    assert isinstance(StreamingSVD(2).fit_transform(rows), np.ndarray)


def test_an_unknown_kind_of_output_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^set_output: transform must be one of .* or None, got 'csv'$"):
        StreamingSVD(2).set_output(transform="csv")


def test_a_table_with_other_columns_is_refused() -> None:
    rows = random_rows(300, 5)
    estimator, clean = (StreamingSVD(2).fit(frame(rows)) for _ in range(2))
    assert list(estimator.feature_names_in_) == [f"weight {i}" for i in range(5)]
    expected = (
        "X must have the columns that were seen first, in their order: column 1 must be 'weight 1', got 'weight 3'"
    )
    for method in (estimator.transform, estimator.partial_fit):
        with pytest.raises(ValueError, match=f"^{method.__name__}: {expected}$"):
            method(frame(rows)[[f"weight {i}" for i in (0, 3, 2, 1, 4)]])
    with pytest.raises(ValueError, match=r": X has 3 features, but StreamingSVD is expecting 5 features as input$"):
        estimator.transform(frame(rows[:, :3]))
    with pytest.warns(
        UserWarning, match="^X does not have valid feature names, but StreamingSVD was fitted with"
    ) as seen:
        estimator.transform(rows)
    assert seen[0].filename == __file__  # the warning is about the caller's line
    with pytest.warns(UserWarning, match="^X has feature names, but StreamingSVD was fitted without feature names"):
        StreamingSVD(2).fit(rows).transform(frame(rows))
    assert results(estimator) == results(clean)
    assert not hasattr(estimator.fit(rows), "feature_names_in_")
    other = StreamingSVD(2).fit(frame(rows).rename(columns={"weight 4": "bias"}))
    with pytest.raises(ValueError, match=r"^merge: other must have the same feature_names_in_$"):
        clean.merge(other)
    assert list(StreamingSVD(2).merge(other).feature_names_in_)[-1] == "bias"


def test_names_out_are_for_the_columns_that_were_seen() -> None:
    estimator = StreamingSVD(2).partial_fit(frame(random_rows(300, 3)))
    assert list(estimator.get_feature_names_out()) == ["streamingsvd0", "streamingsvd1"]
    with pytest.raises(
        ValueError, match=r"input_features is not equal to feature_names_in_: column 0 must be 'weight 0'"
    ):
        estimator.get_feature_names_out(["a", "b", "c"])
    with pytest.raises(
        ValueError, match=r"input_features should have length equal to number of features \(3\), got 2$"
    ):
        estimator.get_feature_names_out(["a", "b"])
    with pytest.raises(ValueError, match=r"^get_feature_names_out: this StreamingSVD has seen no rows"):
        StreamingSVD(2).get_feature_names_out()


def test_a_pickle_and_a_clone_keep_what_they_should() -> None:
    rows = random_rows(300, 5)
    estimator = StreamingSVD(2).set_output(transform="pandas").fit(frame(rows))
    again = pickle.loads(pickle.dumps(estimator))
    assert results(again) == results(estimator)
    assert again.transform(frame(rows)).equals(estimator.transform(frame(rows)))
    assert list(again.feature_names_in_) == list(estimator.feature_names_in_)
    clone = sklearn.base.clone(estimator)
    assert not hasattr(clone, "feature_names_in_")
    assert isinstance(clone.fit_transform(rows), pandas.DataFrame)


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_search_over_a_pipeline_finds_the_number_of_components(n_jobs: int) -> None:
    """In joblib's own processes too, to which estimators travel as pickles."""
    rng = np.random.default_rng(0)
    signals = rng.standard_normal((200, 3))
    rows = signals @ rng.standard_normal((3, 12)) + 1e-3 * rng.standard_normal((200, 12))
    pipeline = Pipeline([("scale", StandardScaler()), ("svd", StreamingSVD(1, num_threads=1)), ("ridge", Ridge(1e-6))])
    grid = {"svd__n_components": [1, 2, 3], "svd__center": [False, True]}
    search = GridSearchCV(pipeline.set_output(transform="pandas"), grid, cv=3, n_jobs=n_jobs)
    search.fit(frame(rows), signals.sum(1))
    assert search.best_params_["svd__n_components"] == 3
    assert search.best_score_ > 0.999
    assert list(search.best_estimator_[:2].get_feature_names_out()) == [f"streamingsvd{i}" for i in range(3)]
    assert "StreamingSVD" in search._repr_html_()  # what a notebook shows


def test_it_stands_beside_other_transformers() -> None:
    table = frame(random_rows(50, 6))
    columns = ColumnTransformer([("svd", StreamingSVD(2), [f"weight {i}" for i in range(4)])], remainder="passthrough")
    out = columns.set_output(transform="pandas").fit_transform(table)
    assert list(out.columns) == [
        "svd__streamingsvd0",
        "svd__streamingsvd1",
        "remainder__weight 4",
        "remainder__weight 5",
    ]
    union = FeatureUnion([("svd", make_pipeline(StandardScaler(), StreamingSVD(2))), ("scale", StandardScaler())])
    assert union.set_output(transform="pandas").fit_transform(table).shape == (50, 8)
