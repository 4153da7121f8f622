"""Results that a notebook shows as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


class Table:
    """Something with rows: a data frame when asked for one, a table where a notebook shows it."""

    def rows(self) -> list[dict[str, Any]]:
        """Column name to value, for each row."""
        raise NotImplementedError

    def to_dataframe(self) -> DataFrame:
        """The rows as a `pandas.DataFrame`."""
        from pandas import DataFrame

        return DataFrame(self.rows())

    def _repr_html_(self) -> str:
        return str(self.to_dataframe().to_html(max_rows=60, index=False, float_format="{:.4g}".format))
