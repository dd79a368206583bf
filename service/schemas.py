"""What goes in and out over HTTP: decoded by msgspec into the trainer's types, described by pydantic for OpenAPI."""

import re
import unicodedata
from collections.abc import Callable, Mapping
from itertools import count
from types import GenericAlias
from typing import Annotated, Any, Final

import msgspec
from pydantic import BaseModel, ConfigDict, Field, create_model

from service.answers import Asked
from service.predictor import Question
from service.problems import INVALID, NOT_JSON, Fault, Problem
from trainer.config import FeatureSettings, SchemaSettings, ServiceSettings, Settings
from trainer.errors import RecordError
from trainer.predictive import Point
from trainer.schema import FLOAT32_MAX, Columns, FeatureSchema, explain

# Beyond these the two ends of an interval are no longer different 64-bit floats, or no longer inside (0, 1).
NARROWEST_INTERVAL: Final = 1e-6
WIDEST_INTERVAL: Final = 1 - 1e-6
INSTANCES: Final = b'"instances"'
LONGEST_DETAIL: Final = 300  # characters
EXAMPLE_VECTOR: Final = 32  # longer vectors are null in the example
EARLIEST_MS: Final = -62_135_596_800_000  # the year 1
LATEST_MS: Final = 253_402_300_799_999  # the end of the year 9999

# What a request may ask beside its balance: name, type, default.
ASKED_OF_NUMBERS: Final = (
    ("interval", Annotated[float, msgspec.Meta(ge=NARROWEST_INTERVAL, le=WIDEST_INTERVAL)] | None, None),
    ("point", Point, "median"),
)
# In JSON Schema 3.0 is an integer too, which msgspec's own would not be.
ASKED_OF_CLASSES: Final = (("top", Annotated[float, msgspec.Meta(ge=1, multiple_of=1)] | None, None),)
Number = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX)]
SCALAR: Final[Any] = str | float | bool


def question_decoder(schema: FeatureSchema, settings: ServiceSettings) -> Callable[[bytes], Question]:
    """A function from a request's body to columns and what is asked about them.

    The body is an object with `instances`, or one bare record, which has none. The function raises a Problem where the
    body is not JSON, or does not fit; it names the instance and the field.
    """
    many: Any = GenericAlias(list, (schema.instance_type,))
    limits = msgspec.Meta(min_length=1, max_length=settings.max_instances)

    def request_type(instances: Any) -> type[Any]:
        own = ASKED_OF_NUMBERS if schema.classes is None else ASKED_OF_CLASSES
        balance = ("balance", Annotated[float, msgspec.Meta(ge=0, le=1)], settings.default_balance)
        return msgspec.defstruct("Request", [("instances", instances), balance, *own], forbid_unknown_fields=True)

    whole_type = request_type(Annotated[many, limits])
    asked = [name for name in Asked._fields if name in whole_type.__struct_fields__]
    decode_request = msgspec.json.Decoder(whole_type).decode
    decode_rest = msgspec.json.Decoder(request_type(list[msgspec.Raw])).decode
    probe = msgspec.json.Decoder(_Probe).decode
    alone = Asked(settings.default_balance)

    def question(columns: Columns, request: Any) -> Question:
        what = Asked(**{name: getattr(request, name) for name in asked})
        return Question(columns, what if what.top is None else what._replace(top=int(what.top)))

    def plain(body: bytes) -> Question | None:
        """What nearly all requests are, by the fast way; None where it does not know."""
        start = body.find(INSTANCES)
        colon = body.find(b":", start)
        if start < 0 or body[start + len(INSTANCES) : colon].strip():
            return None
        found = schema.columns_within(body, colon + 1, settings.max_instances)
        if found is None:
            return None
        columns, end = found
        try:
            request = decode_rest(b"%b[]%b" % (body[: colon + 1], body[end:]))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        return None if request.instances else question(columns, request)  # they came twice

    def bare(body: bytes, refusal: Exception) -> Question:
        try:
            if isinstance(refusal, msgspec.ValidationError) and probe(body).instances is msgspec.UNSET:
                row = [schema.decode_instance(body)]
                return Question(Columns(schema.numeric(row), schema.categorical(row)), alone)
        except msgspec.ValidationError:
            pass  # not even an object
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            refusal = error  # the decoder gave up at a wrong field, before it came to the broken place
        except RecordError as error:
            raise _problem(error, error.field, None) from None
        raise _request_problem(explain(refusal)) from None

    def decode(body: bytes) -> Question:
        found = plain(body)
        if found is not None:
            return found
        try:
            request: Any = decode_request(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return bare(body, error)
        try:
            columns = schema.columns(request.instances)
        except RecordError as fault:
            raise _problem(fault, fault.field, fault.instance) from None
        return question(columns, request)

    return decode


class _Probe(msgspec.Struct):
    """Tells a request from a bare record, which has no `instances`."""

    instances: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _request_problem(error: RecordError) -> Problem:
    match = re.fullmatch(r"instances\[(\d+)\]\.?(.*)", error.field, re.DOTALL)
    return _problem(error, match[2], int(match[1])) if match else _problem(error, error.field, None)


def _problem(error: RecordError, field: str, instance: int | None) -> Problem:
    text = str(error)
    if len(text) > LONGEST_DETAIL:  # it may quote the request, which may be megabytes
        text = f"{text[:LONGEST_DETAIL]}…"
    if error.reason == "not_json":
        return Problem(NOT_JSON, text)
    what = text.removeprefix(f"{error.field}: ")
    where = "" if instance is None else f"instance {instance}"
    where = ", ".join(part for part in (where, f"field {field!r}" if field else "") if part)
    return Problem(INVALID, f"{where}: {what}" if where else what, [Fault(what, field, instance)])


# For OpenAPI


class _Described(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class PredictResponse(_Described):
    """Predictions in label units, in the order of the instances."""

    predictions: list[float]
    balance: float = Field(description="The label prior that was used.")
    model_version: int = Field(description="The snapshot that answered, all instances alike.")
    lower: list[float] | None = Field(default=None, description="Lower ends, where an interval was asked for.")
    upper: list[float] | None = Field(default=None, description="Upper ends, where an interval was asked for.")


class PredictClassesResponse(_Described):
    """Predicted classes, in the order of the instances."""

    predictions: list[str] = Field(description="The most probable class of each.")
    balance: float = Field(description="The label prior that was used.")
    model_version: int = Field(description="The snapshot that answered, all instances alike.")
    probabilities: list[dict[str, float]] = Field(
        description="Of the classes seen so far, from the most probable; all of them, or as many as `top` asked for."
    )


class DensityResponse(_Described):
    """A prediction, and the distribution that it is read from; in label units."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prediction": 10.0,
                    "balance": 0.5,
                    "model_version": 42,
                    "edges": [0.0, 8.0, 12.0, 20.0],
                    "probabilities": [0.25, 0.5, 0.25],
                    "lower": 1.6,
                    "upper": 18.4,
                }
            ]
        }
    )

    prediction: float = Field(description="As POST /predict answers.")
    balance: float = Field(description="The label prior that was used.")
    model_version: int
    edges: list[float] = Field(description="Ends of the cells, increasing, one more than there are cells.")
    probabilities: list[float] = Field(description="That the label lies in each cell, evenly spread; they sum to 1.")
    lower: float | None = Field(default=None, description="Lower end, where an interval was asked for.")
    upper: float | None = Field(default=None, description="Upper end, where an interval was asked for.")


class FaultResponse(_Described):
    """One thing that is wrong with a request, and where."""

    detail: str
    field: str = Field(description="Dotted path inside the instance, or of the request where `instance` is null.")
    instance: int | None = Field(description="Place in `instances`, from 0.")


class ProblemResponse(_Described):
    """A problem document of RFC 9457."""

    type: str = Field(examples=["urn:tailstream:problem:invalid-request"])
    title: str
    status: int
    detail: str
    errors: list[FaultResponse] | None = None


def request_model(settings: Settings) -> Any:
    """The type of a body for POST /predict, as schema and task make it."""
    schema, service = settings.record_schema, settings.service
    instance = _instance_model(schema)
    many: Any = GenericAlias(list, (instance,))
    asked: dict[str, Any] = {
        "interval": (
            Annotated[float, Field(ge=NARROWEST_INTERVAL, le=WIDEST_INTERVAL)] | None,
            Field(default=None, description="Probability of a central interval."),
        ),
        "point": (
            Point,
            Field(default="median", description="Median: small absolute error; mean: small squared error."),
        ),
    }
    example: dict[str, Any] = {"instances": [_example(schema)], "balance": 1.0, "interval": 0.9}
    if settings.task == "classification":
        most = Field(default=None, description="Only the probabilities of so many classes, the most probable.")
        asked = {"top": (Annotated[int, Field(ge=1)] | None, most)}
        example = {"instances": [_example(schema)], "balance": 1.0, "top": 3}
    request = create_model(
        "PredictRequest",
        __config__=ConfigDict(extra="forbid", json_schema_extra={"examples": [example]}),
        __doc__="Records to predict for, without their label, and what to answer.",
        instances=(many, Field(min_length=1, max_length=service.max_instances)),
        balance=(
            Annotated[float, Field(ge=0, le=1)],
            Field(default=service.default_balance, description="Label prior: 0 the stream's own, 1 all labels alike."),
        ),
        **asked,
    )
    return request | instance


def response_model(settings: Settings) -> type[BaseModel]:
    """The type of an answer of POST /predict, as the task makes it."""
    return PredictClassesResponse if settings.task == "classification" else PredictResponse


def _instance_model(schema: SchemaSettings) -> type[BaseModel]:
    leaves = {name: _leaf_type(feature) for name, feature in schema.features.items()}
    if schema.time:
        leaves.setdefault(schema.time, SCALAR)  # the decoder reads it, though no prediction depends on it
    return _level("Instance", _nested(leaves), _example(schema), set())


def _level(name: str, tree: dict[str, Any], example: Any, taken: set[str]) -> type[BaseModel]:
    taken.add(name)
    # JSON keys need not be identifiers, so the attributes are numbered and the keys are their aliases.
    fields: dict[str, Any] = {}
    for number, (key, leaf) in enumerate(tree.items()):
        if isinstance(leaf, dict):
            leaf = _level(_name_within(name, key, taken), leaf, example.get(key, {}), taken)
        fields[f"f{number}"] = (leaf | None, Field(default=None, alias=key, title=key))
    return create_model(
        name,
        __config__=ConfigDict(extra="allow", json_schema_extra={"examples": [example]}),
        __doc__="One record. A field that is missing or null is imputed, and one that is not listed is ignored.",
        **fields,
    )


def _name_within(name: str, key: str, taken: set[str]) -> str:
    """A name for the object at a key, which generated clients call a class by."""
    plain = unicodedata.normalize("NFKD", key).encode("ascii", "ignore").decode()
    whole = name + "".join(word[0].upper() + word[1:] for word in re.findall("[A-Za-z0-9]+", plain))
    return next(found for n in count(1) if (found := whole if n == 1 else f"{whole}{n}") not in taken)


def _leaf_type(feature: FeatureSettings) -> Any:
    match feature.kind:
        case "numeric":
            return Number
        case "boolean":
            return bool
        case "categorical":
            return SCALAR
        case "vector":
            return Annotated[list[Number], Field(min_length=feature.size, max_length=feature.size)]
        case "timestamp":
            iso = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
            return iso | Annotated[float, Field(ge=EARLIEST_MS, le=LATEST_MS, description="Epoch milliseconds.")]


def _example(schema: SchemaSettings) -> dict[str, Any]:
    """A record that POST /predict answers."""
    return _nested({name: _example_value(feature) for name, feature in schema.features.items()})


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path, as objects within objects."""
    root: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, leaf = path.split(".")
        table = root
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = value
    return root


def _example_value(feature: FeatureSettings) -> Any:
    match feature.kind:
        case "numeric":
            return 1.5
        case "boolean":
            return True
        case "categorical":
            return "A"
        case "vector":
            return [0.5] * feature.size if feature.size and feature.size <= EXAMPLE_VECTOR else None
        case "timestamp":
            return "2026-01-31T17:30:00Z"
