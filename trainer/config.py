"""Settings: one TOML file, every key overridable by the environment, unknown keys refused.

A key `[kafka] topic` is overridden by `TAILSTREAM_KAFKA__TOPIC`. Lists may be given there with commas, tables as JSON.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from trainer.errors import ConfigError

ENV_PREFIX: Final = "TAILSTREAM_"
ENV_OF_THE_TESTS: Final = ("TAILSTREAM_TEST_", "TAILSTREAM_COMPOSE_")  # not settings; all others must be

# Kubernetes puts such variables into every container beside a Service whose name begins with `tailstream`.
KUBERNETES_LINK: Final = re.compile(r"(_SERVICE_HOST|_SERVICE_PORT(_\w+)?|_PORT(_\d+_(TCP|UDP)(_\w+)?)?)$")

OBJECT_STORES: Final = ("s3", "gs", "az", "abfs", "abfss")

TaskName = Literal["regression", "classification"]
FeatureKind = Literal["numeric", "categorical", "boolean", "vector", "timestamp"]
CLASS_LOSSES: Final = ("logit_adjusted", "cross_entropy", "class_balanced", "focal", "influence_balanced")
# What a task's settings are where nothing is said, instead of the defaults of regression.
TASK_DEFAULTS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "regression": {},
    "classification": {
        "batch": {"size": 32},
        "learner": {
            "loss": "logit_adjusted",
            "label_memory": 0,
            "step_rows": 16,
            "replay_steps": 1,
            "replay_warm_up_rows": 0,
            "replay_rows": 4096,
        },
        "model": {"head": "linear", "hidden": [256, 256]},
    },
}


class _Table(BaseModel):
    """A table of the configuration: frozen, and nothing in it that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FeatureSettings(_Table):
    """How one field of a record becomes numbers; a bare word in TOML is its `kind`."""

    kind: FeatureKind
    size: Annotated[int, Field(ge=1, le=65536)] | None = None
    buckets: Annotated[int, Field(ge=2, le=1 << 24)] | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if (self.kind == "vector") != (self.size is not None):
            raise ValueError('a vector needs a size, as in {kind = "vector", size = 64}, and nothing else takes one')
        if self.buckets is not None and self.kind != "categorical":
            raise ValueError("only a categorical feature takes buckets")
        return self


class SchemaSettings(_Table):
    """Which fields of a record (dotted paths) are the label, the features, the id and the event time."""

    label: str = Field(min_length=1, description="Field to learn, by its dotted path.")
    classes: Annotated[list[str], NoDecode] = Field(
        default=[], description="The classes, for classification; empty: each is added when it is first seen."
    )
    max_classes: int = Field(
        default=1000, ge=2, le=1 << 20, description="Most classes; records of further ones go to the dead letters."
    )
    id: str | None = Field(default=None, description="Field that identifies a record; `publish` uses it as the key.")
    time: str | None = Field(
        default=None, description="Event time, ISO 8601 or epoch milliseconds; without it the Kafka timestamp."
    )
    features: dict[str, FeatureSettings] = Field(
        min_length=1,
        description="Field = kind: `numeric`, `categorical`, `boolean`, `timestamp`, or a table "
        '`{kind = "vector", size = 64}`, `{kind = "categorical", buckets = 4096}`.',
    )

    @field_validator("features", mode="before")
    @classmethod
    def _bare_kinds(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: {"kind": kind} if isinstance(kind, str) else kind for name, kind in value.items()}
        return value

    @field_validator("classes", mode="before")
    @classmethod
    def _classes_by_their_text(cls, value: Any) -> Any:
        """An integer names the same class as its text, as it does in a record."""
        names = _split(value)
        return [str(name) if type(name) is int else name for name in names] if isinstance(names, list) else names

    @model_validator(mode="after")
    def _classes_are_different_and_not_too_many(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError('classes: one is listed twice (1 and "1" are the same)')
        if len(self.classes) > self.max_classes:
            raise ValueError(f"classes: {len(self.classes)} are listed and max_classes is {self.max_classes}")
        return self

    @model_validator(mode="after")
    def _roles_go_together(self) -> Self:
        if self.label in self.features:
            raise ValueError(f"the label {self.label!r} is among the features: a model would only copy it")
        if self.time is not None:
            kind = "label" if self.time == self.label else getattr(self.features.get(self.time), "kind", "timestamp")
            if kind in ("label", "boolean", "vector"):
                raise ValueError(f"time is {self.time!r}, which is the {kind} of a record and cannot be its time")
        return self


class KafkaSettings(_Table):
    """Where the samples come from."""

    bootstrap_servers: Annotated[list[str], NoDecode] = Field(
        min_length=1, description="Brokers to ask first, `host:port`."
    )
    topic: str = Field(min_length=1, max_length=249, description="Topic of labelled samples.")
    group: str = Field(default="tailstream", description="Consumer group under which offsets are shown to lag tools.")
    start: str = Field(
        default="earliest", description="Where a first start begins: `earliest`, `latest` or an ISO 8601 time."
    )
    on_lost_offsets: Literal["fail", "earliest", "latest"] = Field(
        default="fail", description="What to do when the offsets to resume from have expired."
    )
    client: Literal["python", "confluent"] = Field(
        default="python",
        description="What reads the topic: kafka-python, or `confluent`, several times as fast "
        '(`pip install "tailstream[fast]"`).',
    )
    isolation: Literal["read_committed", "read_uncommitted"] = Field(
        default="read_committed", description="Whether records of open or aborted transactions are left out."
    )
    dead_letter_topic: str = Field(
        default="", description="Where rejected records go; empty means `<topic>.dead-letters`."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to the Kafka client as they are: `security_protocol`, `sasl_*`, `ssl_*`.",
    )

    @field_validator("bootstrap_servers", mode="before")
    @classmethod
    def _commas(cls, value: Any) -> Any:
        return _split(value)

    @field_validator("bootstrap_servers")
    @classmethod
    def _host_and_port(cls, value: list[str]) -> list[str]:
        for server in value:
            if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}", server):
                raise ValueError(f"{server!r} is not host:port")
        return value

    @field_validator("start")
    @classmethod
    def _start_is_a_place(cls, value: str) -> str:
        if value not in ("earliest", "latest"):
            from datetime import datetime

            try:
                datetime.fromisoformat(value)
            except ValueError:
                raise ValueError(f"{value!r} is neither earliest, latest nor an ISO 8601 time") from None
        return value

    @property
    def dead_letters(self) -> str:
        """Name of the topic for rejected records."""
        return self.dead_letter_topic or f"{self.topic}.dead-letters"


class SourceSettings(_Table):
    """How records get from the topic to the learner."""

    process: bool = Field(
        default=True, description="Fetch and decode in a process of their own, beside the learning, on a second core."
    )


class BatchSettings(_Table):
    """How records are grouped."""

    size: int = Field(default=256, ge=1, le=65536, description="Rows in a full batch.")
    max_wait_s: float = Field(default=0.5, gt=0, description="A partial batch is trained on after this long.")


class SigmaInLabelUnits(_Table):
    """A fixed sigma in the label's own units."""

    label_units: float = Field(gt=0)


class LearnerSettings(_Table):
    """How the model learns."""

    loss: Literal[
        "bmc",
        "nll",
        "gai",
        "bni",
        "mse",
        "l1",
        "huber",
        "logit_adjusted",
        "cross_entropy",
        "class_balanced",
        "focal",
        "influence_balanced",
    ] = Field(
        default="bmc",
        description="Loss: `bmc` (either head), `nll` (mixture head); with the gaussian head also `gai`, `bni`, `mse`, "
        "`l1`, `huber`. Of classes: `logit_adjusted`, `cross_entropy`, `class_balanced`, `focal`, "
        "`influence_balanced`.",
    )
    class_weights: Literal["inverse", "effective"] = Field(
        default="inverse",
        description="Weights of `class_balanced` and `influence_balanced`: one over a class's rows, or over its "
        "effective number of them.",
    )
    focal_gamma: float = Field(default=2.0, ge=0, description="How much `focal` leaves out what is known already.")
    influence_after: Annotated[int, Field(ge=0)] | Literal["plateau"] = Field(
        default="plateau",
        description="When `influence_balanced` begins, cross-entropy before: after so many rows, or at the loss's "
        "`plateau`.",
    )
    sigma: Literal["learned", "adaptive"] | Annotated[float, Field(gt=0)] | SigmaInLabelUnits = Field(
        default="learned",
        description="Noise of the gaussian head: `learned`, `adaptive`, a number in label standard deviations, or "
        "`{label_units = 8.0}`.",
    )
    sigma_lr: float = Field(default=1e-2, gt=0, description="Learning rate of a learned sigma.")
    lr: float = Field(default=2e-3, gt=0, description="Learning rate of Adam.")
    weight_averaging: float = Field(
        default=0.98, ge=0, lt=1, description="Decay a step of the averaged weights kept beside the current ones."
    )
    step_rows: int = Field(default=64, ge=1, description="Rows of one optimiser step.")
    replay_steps: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default=4,
        description="Steps on rows of the replay buffer after each batch. `auto` takes them while no batch is waiting, "
        "up to two rows for each new one, and none while the trainer is behind; what is learned then depends on the "
        "clock.",
    )
    replay_warm_up_rows: int = Field(
        default=4096,
        ge=0,
        description="Until so many rows were seen there are more replay steps, the fewer rows the more, up to eight "
        "times as many; 0 for never. Not with `auto`.",
    )
    replay_rows: int = Field(default=16384, ge=1, description="Rows that the replay buffer holds.")
    label_memory: int = Field(
        default=512, ge=0, description="Labels of the replay buffer that join the balanced loss of each step."
    )
    gradient_clip: float = Field(default=1.0, gt=0, description="Largest norm of a gradient.")
    metrics_fading: float = Field(
        default=0.9999, gt=0, lt=1, description="Weight that the fading prequential metrics keep per row."
    )
    drift_threshold: float = Field(
        default=500.0,
        gt=0,
        description="Drift alarm: rows whose prequential error is one standard deviation above what it was, or as many "
        "more that are less so.",
    )
    drift_action: Literal["none", "learning_rate", "forget"] = Field(
        default="none",
        description="For 5,000 rows after an alarm: nothing, three times the learning rate, or a label density that "
        "forgets eight times as fast.",
    )


class ModelSettings(_Table):
    """What the model is made of."""

    body: str = Field(
        default="tabular", description="`tabular`, or `my_package.my_module:make_body` for a body of your own."
    )
    hidden: Annotated[list[Annotated[int, Field(ge=1)]], NoDecode] = Field(
        default=[128, 128], min_length=1, description="Widths of the tabular body's layers."
    )
    embedding: int = Field(default=8, ge=1, description="Numbers that stand for one category.")
    category_buckets: int = Field(
        default=1024, ge=2, le=1 << 24, description="Buckets that a feature's categories are hashed to."
    )
    head: Literal["mixture", "gaussian", "linear"] = Field(
        default="mixture",
        description="Predicted density: a `mixture` of Gaussians, or one `gaussian` with one sigma for all rows. "
        "`linear` is the head of classes.",
    )
    components: int = Field(default=4, ge=1, le=64, description="Gaussians of the mixture head.")

    @field_validator("hidden", mode="before")
    @classmethod
    def _commas(cls, value: Any) -> Any:
        return _split(value)

    @field_validator("body")
    @classmethod
    def _body_is_importable(cls, value: str) -> str:
        if value != "tabular" and not re.fullmatch(r"[\w.]+:\w+", value):
            raise ValueError(f'{value!r} is neither "tabular" nor "package.module:function"')
        return value


class StoreSettings(_Table):
    """Where snapshots live."""

    url: str = Field(
        default="./snapshots",
        description="Where trainer and service share snapshots: a folder, or `s3://bucket/prefix` (also `gs://`, `az://`).",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to the client of an object store as they are: `endpoint`, `region`, `access_key_id`, "
        "`secret_access_key`, ...; without them the environment (`AWS_*`) counts.",
    )
    lease_s: float = Field(
        default=10.0,
        ge=0.5,
        description="Object store: a trainer that is not heard of for this long may be replaced by another.",
    )
    cache: str = Field(
        default="", description="Object store: folder for fetched models; empty means one below the temporary folder."
    )
    interval_s: float = Field(
        default=0.5, ge=0, description="Seconds between snapshots; stretched, so that saving takes at most 5%."
    )

    @field_validator("url")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        scheme, found, rest = value.partition("://")
        if found and scheme != "file" and scheme not in OBJECT_STORES:
            known = ", ".join(f"{name}://" for name in OBJECT_STORES)
            raise ValueError(f"{value!r} is no place for snapshots: give a path, a file:// URL, or one of {known}")
        if found and not rest.strip("/"):
            raise ValueError(f"{value!r} names no {'folder' if scheme == 'file' else 'bucket'}")
        return value

    @model_validator(mode="after")
    def _options_are_of_an_object_store(self) -> Self:
        if self.is_folder and (self.options or self.cache):
            raise ValueError("options and cache are for an object store, and url is a folder")
        return self

    @property
    def is_folder(self) -> bool:
        """Whether the store is on a disk."""
        return "://" not in self.url or self.url.startswith("file://")

    @property
    def path(self) -> Path:
        """The folder of a store on a disk."""
        assert self.is_folder, f"{self.url} is not a folder"
        return Path(self.url.removeprefix("file://"))


class TrainerSettings(_Table):
    """The trainer process."""

    metrics_host: str = Field(default="127.0.0.1", description="Address of the trainer's own `/metrics`.")
    metrics_port: int = Field(default=9101, ge=0, le=65535, description="Its port; 0 takes a free one.")
    metrics_interval_s: float = Field(default=1.0, gt=0, description="How often metrics are read off the device.")
    stop_grace_s: float = Field(default=20.0, gt=0, description="Longest time that a clean stop may take.")
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="Log lines for people or for machines; `auto` looks whether a terminal reads them."
    )


class ServiceSettings(_Table):
    """The service process."""

    host: str = Field(default="127.0.0.1", description="Address to bind.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    workers: int = Field(
        default=1, ge=1, le=256, description="Processes that answer; each loads the model and may keep one core busy."
    )
    default_balance: float = Field(
        default=0.5, ge=0, le=1, description="Label prior of an answer that asks for none: 0 the stream's, 1 balanced."
    )
    api_keys_file: str = Field(
        default="", description="File of API keys, one `name:key` a line; without one only loopback may be bound."
    )
    metrics_need_key: bool = Field(default=False, description="Ask for an API key at `/metrics` too.")
    allow_unauthenticated: bool = Field(
        default=False, description="Allow binding other addresses than loopback without API keys."
    )
    allowed_hosts: Annotated[list[str], NoDecode] = Field(
        default=[],
        description="Names that requests may be made to, in their Host header, beside localhost; `*.example.org` for "
        "all below, `*` for any. Empty: none beside `host`; any where keys are asked for or `allow_unauthenticated` "
        "is set.",
    )
    poll_interval_s: float = Field(default=0.2, gt=0, description="How often the store is looked at for a new version.")
    max_model_age_s: float | None = Field(
        default=None, gt=0, description="Not ready when the model is older than this while the trainer lags."
    )
    max_body_bytes: int = Field(default=8 << 20, ge=1024, description="Largest request body; past it 413.")
    max_instances: int = Field(default=4096, ge=1, description="Most instances a request; past it 422.")
    request_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Longest time for a body to arrive (else 408), and then for its answer (else 503).",
    )
    drain_s: float = Field(
        default=0.0,
        ge=0,
        le=300,
        description="How long a service that is told to stop goes on answering while `/readyz` says 503, so that a "
        "load balancer sends requests elsewhere first.",
    )
    max_queue: int = Field(default=1024, ge=1, description="Most requests waiting; past it 503 with Retry-After.")
    max_batch_size: int = Field(
        default=1024,
        ge=1,
        le=65536,
        description="Most rows in a forward pass, which waiting requests share; a larger request has its own.",
    )
    max_wait_s: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How long a forward pass that is not full may wait for more requests; 0 waits for none.",
    )
    ssl_certfile: str = Field(
        default="", description="Certificate chain, PEM: serves HTTPS instead of HTTP; read again at a restart."
    )
    ssl_keyfile: str = Field(default="", description="Its private key, where it is not in the same file.")
    ssl_keyfile_password: str = Field(default="", description="Password of an encrypted private key.")
    ssl_ca_certs: str = Field(
        default="", description="Authorities, PEM: only clients with a certificate of theirs are let in."
    )

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _commas(cls, value: Any) -> Any:
        return _split(value)

    @field_validator("allowed_hosts")
    @classmethod
    def _names_without_a_port(cls, value: list[str]) -> list[str]:
        for name in value:
            if name != "*" and not re.fullmatch(r"(\*\.)?[\w-]+(\.[\w-]+)*|[0-9a-fA-F:.]+", name):
                raise ValueError(f"{name!r} is no host name (without a port), *.name or *")
        return value

    @model_validator(mode="after")
    def _tls_needs_a_certificate(self) -> Self:
        for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
            if getattr(self, name) and not self.ssl_certfile:
                raise ValueError(f"{name} is set and ssl_certfile is not: without a certificate there is no HTTPS")
        return self


class Settings(BaseSettings):
    """The whole configuration, as `load` reads it."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_prefix_target="all",
        env_nested_delimiter="__",
    )

    task: TaskName = Field(
        default="regression", description="What is learned: `regression` (a number) or `classification` (a class)."
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="`auto`, `cpu`, `cuda` or `cuda:N`."
    )
    seed: int = Field(default=0, ge=0, description="Seed of everything random.")
    threads: int = Field(
        default=1, ge=1, description="CPU threads that torch may use; small models are fastest with one."
    )
    kafka: KafkaSettings
    # `schema` is a method of pydantic's own; the table keeps the short name.
    record_schema: SchemaSettings = Field(alias="schema")
    source: SourceSettings = SourceSettings()
    batch: BatchSettings = BatchSettings()
    learner: LearnerSettings = LearnerSettings()
    model: ModelSettings = ModelSettings()
    store: StoreSettings = StoreSettings()
    trainer: TrainerSettings = TrainerSettings()
    service: ServiceSettings = ServiceSettings()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, tables: Any) -> Any:
        if not isinstance(tables, dict):
            return tables
        defaults = TASK_DEFAULTS.get(str(tables.get("task", "regression")), {})
        filled = dict(tables)
        for name, table in defaults.items():
            given = tables.get(name, {})
            if isinstance(given, dict):
                filled[name] = {**table, **given}
        return filled

    @model_validator(mode="after")
    def _loss_and_head_fit_the_task(self) -> Self:
        of_classes = self.task == "classification"
        if (self.learner.loss in CLASS_LOSSES) != of_classes:
            raise ValueError(f'learner.loss = "{self.learner.loss}" is not a loss of task = "{self.task}"')
        if (self.model.head == "linear") != of_classes:
            raise ValueError(f'model.head = "{self.model.head}" is not a head of task = "{self.task}"')
        if self.record_schema.classes and not of_classes:
            raise ValueError('schema.classes needs task = "classification"')
        return self

    @model_validator(mode="after")
    def _the_loss_fits_the_head(self) -> Self:
        if self.task != "regression":
            return self
        if self.model.head == "mixture" and self.learner.loss not in ("bmc", "nll"):
            raise ValueError(f'learner.loss = "{self.learner.loss}" needs model.head = "gaussian"')
        if self.model.head == "gaussian" and self.learner.loss == "nll":
            raise ValueError('learner.loss = "nll" needs model.head = "mixture"')
        return self

    @model_validator(mode="after")
    def _a_batch_fits_the_replay_buffer(self) -> Self:
        if self.learner.replay_rows < self.batch.size:
            raise ValueError(
                f"learner.replay_rows is {self.learner.replay_rows}, fewer than batch.size {self.batch.size}: "
                "steps take their rows from the buffer, so it holds at least one batch"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file, which arrives as keyword arguments."""
        return env_settings, init_settings


def load(path: Path, changes: Mapping[str, Any] | None = None) -> Settings:
    """Reads the configuration file, with the environment laid over it.

    Args:
        path: the TOML file.
        changes: values by dotted key, in place of the file's.

    Raises:
        ConfigError: the file is absent, is not TOML, or a key is missing, unknown or has an unusable value.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; see the README for one to start from") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
    for key, value in (changes or {}).items():
        *parents, name = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    problems = _unknown_variables()
    try:
        settings = Settings(**tables)
    except ValidationError as error:
        raise ConfigError(_explain(path, [*problems, *_problems(error)])) from error
    except SettingsError as error:
        problem = f"{error}: {error.__cause__}; a table is written there as JSON"
        raise ConfigError(_explain(path, [*problems, problem])) from error
    if problems:
        raise ConfigError(_explain(path, problems))
    return settings


def _explain(path: Path, problems: list[str]) -> str:
    lines = [f"{path} (with TAILSTREAM_* from the environment) cannot be used:", *problems]
    return "\n  ".join(lines)


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {what}")
    return lines


def _unknown_variables() -> list[str]:
    """Variables that look like settings and name no key or table; what is inside a table, pydantic refuses itself."""
    known = {info.alias or name for name, info in Settings.model_fields.items()}
    return [
        f"{key.replace('__', '.')}: unknown key, from the environment's {name}"
        for name in sorted(os.environ)
        if name.upper().startswith(ENV_PREFIX)
        and not name.upper().startswith(ENV_OF_THE_TESTS)
        and not ("__" not in name and KUBERNETES_LINK.search(name))
        for key in [name[len(ENV_PREFIX) :].lower()]
        if key.partition("__")[0] not in known
    ]


def _split(value: Any) -> Any:
    """A list written with commas, as the environment has it."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
