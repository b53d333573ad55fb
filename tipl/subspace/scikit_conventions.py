"""scikit-learn's conventions for a transformer, without depending on scikit-learn: parameters, columns, tables.

A table is a pandas or polars DataFrame. Nothing here imports scikit-learn, pandas or polars before the user has.
"""

import importlib
import sys
import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_OUTPUTS = ("default", "pandas", "polars")


class ScikitTransformer:
    """A transformer by scikit-learn's conventions. `_parameters` are the names of its constructor's arguments."""

    _parameters: tuple[str, ...]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags; only scikit-learn calls this."""
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="transformer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float32"]),
            input_tags=InputTags(),
        )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments. `deep` is scikit-learn's: no parameter here is an estimator."""
        return {name: getattr(self, name) for name in self._parameters}

    def set_params(self, **params: Any) -> Self:
        """Set constructor arguments, for the next `fit`. Raises ValueError for an unknown one."""
        for name in params:
            if name not in self._parameters:
                raise ValueError(f"set_params: parameters are {', '.join(self._parameters)}, got {name!r}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def set_output(self, *, transform: str | None = None) -> Self:
        """Set what `transform` and `fit_transform` return: "default", "pandas" or "polars"; None changes nothing.

        A table has the columns `get_feature_names_out()`, and in pandas the rows' index. Raises ValueError for another
        value.
        """
        if transform is not None:
            if transform not in _OUTPUTS:
                raise ValueError(f"set_output: transform must be one of {_OUTPUTS} or None, got {transform!r}")
            self._sklearn_output_config = {"transform": transform}  # which sklearn.base.clone copies under this name
        return self

    def _table_library(self) -> str | None:
        """Return whose table the user wants from `transform`, "pandas" or "polars", or None for an array."""
        wanted: str | None = getattr(self, "_sklearn_output_config", {}).get("transform")
        if wanted is None and "sklearn" in sys.modules:
            from sklearn import get_config

            wanted = get_config()["transform_output"]
        return None if wanted in (None, "default") else wanted


def table(library: str, numbers: NDArray[np.float32], columns: NDArray[np.object_], like: Any) -> Any:
    """Return `numbers` (n, k) as a table of the library; one of pandas has the index of `like`, if that is one too."""
    frame = importlib.import_module(library).DataFrame
    if library == "pandas":
        return frame(numbers, index=like.index if isinstance(like, frame) else None, columns=list(columns))
    return frame(numbers, schema=list(columns), orient="row")


def column_names(X: Any) -> NDArray[np.object_] | None:
    """Return the names (p,) of the columns of a table; None for an array, and where the names are not all strings."""
    columns = getattr(X, "columns", None)
    names = [] if columns is None or callable(columns) else list(columns)
    if not names or not all(isinstance(name, str) for name in names):
        return None
    return np.array(names, dtype=object)


def checked_names_in(given: Any, names: NDArray[np.object_] | None, num_features: int) -> None:
    """Raise ValueError unless `given`, the argument of `get_feature_names_out`, are the p columns seen by `fit`."""
    given = np.asarray(given, dtype=object)
    if given.shape != (num_features,):
        raise ValueError(
            "get_feature_names_out: input_features should have length equal to number of features "
            f"({num_features}), got {given.size}"
        )
    if names is not None and not np.array_equal(given, names):
        difference = _first_difference(names, given)
        raise ValueError(f"get_feature_names_out: input_features is not equal to feature_names_in_: {difference}")


def check_same_columns(where: str, owner: str, X: Any, shape: Any, names: Any, num_features: int) -> None:
    """Raise ValueError unless X, of this shape, has the columns that were seen first.

    Warns where only X, or only what was seen first, has names of columns.
    """
    given = column_names(X)
    if len(shape) != 2 or 0 in shape:
        return  # `row_blocks` says what is wrong
    if shape[1] != num_features:
        raise ValueError(
            f"{where}: X must have shape (n, p) = (n, {num_features}), got {tuple(shape)}: X has {shape[1]} features, "
            f"but {owner} is expecting {num_features} features as input"
        )
    if given is not None and names is not None:
        if not np.array_equal(given, names):
            raise ValueError(
                f"{where}: X must have the columns that were seen first, in their order: "
                f"{_first_difference(names, given)}"
            )
    elif given is not None:
        warnings.warn(f"X has feature names, but {owner} was fitted without feature names", stacklevel=5)
    elif names is not None:
        warnings.warn(f"X does not have valid feature names, but {owner} was fitted with feature names", stacklevel=5)


def _first_difference(expected: NDArray[np.object_], given: NDArray[np.object_]) -> str:
    at = int(np.argmax(expected != given))
    return f"column {at} must be {expected[at]!r}, got {given[at]!r}"
