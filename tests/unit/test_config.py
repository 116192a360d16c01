import json
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.status import Network
from worker.config import (
    SETTINGS,
    Config,
    HostApiConfig,
    ImagesConfig,
    NatsConfig,
    NodeConfig,
    PolicyConfig,
    SecretsConfig,
    TlsConfig,
    VolumesConfig,
    load_config,
)
from worker.errors import Configuration
from worker.settings import Kind, Setting

WHOLE = """
[nats]
url = "tls://nats.example:4222"
creds = "node.creds"
nkey = "/etc/nkey"
token_file = "~/token"
insecure = false
domain = "site-1"
replicas = 3
stream_prefix = "FLEET"
[nats.tls]
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"

[node]
name = "mac-1"
data_dir = "/srv/sandfleet"
labels = { zone = "a" }
pools = ["build", "render"]
slots = 12
isolation = "rootfs"
stats_interval_s = 5
on_shutdown = "stop"

[secrets]
dir = "secrets"

[host_api]
url = "http://127.0.0.1:8080"
socket = "/run/api.sock"
secret_file = "jwt"
ttl_s = "30m"

[images]
plain_http = ["registry.lan:5000"]
ca = "registry.pem"
docker_config = "~/config.json"
max_parallel = 5
max_bytes = "20Gi"

[volumes]
s3_ca = "s3.pem"

[policy]
register_roots = ["/srv/images/"]
bind_sources = ["/srv/data", "/srv//more"]
read = ["/usr/share"]
write = ["/scratch"]
env = ["HTTP_PROXY"]
groups = ["audio"]
mach_lookup = ["com.apple.windowserver.*"]
unix_sockets = ["/run/db.sock"]
network = ["none", "localhost"]
isolation = ["process"]
gpu = true
s3_endpoints = ["https://*.lan:443"]
images = ["build/*"]
push = ["registry.lan/*"]
max_memory = "2Gi"
max_containers = 100
[policy.secrets]
db = ["web", "api-*"]
"""

Load = Callable[..., Config]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "node.toml"


@pytest.fixture
def load(file: Path) -> Load:
    def read(
        text: str | bytes, env: dict[str, str] | None = None, flags: dict[str, Any] | None = None
    ) -> Config:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(file, env or {}, flags or {}, system="Linux")

    return read


def refused(load: Load, *args: Any) -> Configuration:
    with pytest.raises(Configuration) as caught:
        load(*args)
    assert "\n" not in caught.value.message
    return caught.value


# -- the whole of it


def test_nothing_given_is_the_contracts_defaults() -> None:
    config = load_config(None, {}, {}, system="Linux")
    assert config == Config()
    assert config.nats == NatsConfig(
        url="nats://127.0.0.1:4222", insecure=False, replicas=1, stream_prefix="SANDFLEET"
    )
    assert (config.node.name, config.node.isolation, config.node.stats_interval_s) == (None, "process", 10.0)
    assert config.host_api.ttl_s == 3600
    policy = config.policy
    grants = (
        policy.register_roots,
        policy.bind_sources,
        policy.read,
        policy.write,
        policy.env,
        policy.groups,
    )
    assert (*grants, policy.mach_lookup, policy.unix_sockets) == ((),) * 8
    assert policy.secrets == {}
    assert policy.network == ("none", "localhost", "outbound", "full")
    assert policy.isolation == ("process", "rootfs")
    assert (policy.images, policy.max_memory_bytes, policy.max_containers) == (("*",), None, None)


def test_the_gpu_is_granted_on_a_mac_only() -> None:
    assert load_config(None, {}, {}, system="Darwin").policy.gpu is True
    assert load_config(None, {}, {}, system="Linux").policy.gpu is False
    assert load_config(None, {}, {"policy.gpu": False}, system="Darwin").policy.gpu is False


def test_the_whole_file(load: Load, file: Path) -> None:
    config = load(WHOLE)
    here = str(file.parent)
    assert config.nats == NatsConfig(
        url="tls://nats.example:4222",
        creds=f"{here}/node.creds",
        nkey="/etc/nkey",
        token_file=os.path.expanduser("~/token"),
        tls=TlsConfig(ca=f"{here}/ca.pem", cert=f"{here}/cert.pem", key=f"{here}/key.pem"),
        domain="site-1",
        replicas=3,
        stream_prefix="FLEET",
    )
    assert config.node == NodeConfig(
        name="mac-1",
        data_dir="/srv/sandfleet",
        labels={"zone": "a"},
        pools=("build", "render"),
        slots=12,
        isolation="rootfs",
        stats_interval_s=5.0,
        on_shutdown="stop",
    )
    assert config.secrets == SecretsConfig(dir=f"{here}/secrets")
    assert config.images == ImagesConfig(
        plain_http=("registry.lan:5000",),
        ca=str(file.parent / "registry.pem"),
        docker_config=os.path.expanduser("~/config.json"),
        max_parallel=5,
        max_bytes="20Gi",
    )
    assert config.volumes == VolumesConfig(s3_ca=f"{here}/s3.pem")
    assert config.host_api == HostApiConfig(
        url="http://127.0.0.1:8080", socket="/run/api.sock", secret_file=f"{here}/jwt", ttl_s=1800.0
    )
    assert config.policy == PolicyConfig(
        register_roots=("/srv/images",),
        bind_sources=("/srv/data", "/srv/more"),
        read=("/usr/share",),
        write=("/scratch",),
        secrets={"db": ("web", "api-*")},
        env=("HTTP_PROXY",),
        groups=("audio",),
        mach_lookup=("com.apple.windowserver.*",),
        unix_sockets=("/run/db.sock",),
        network=(Network.NONE, Network.LOCALHOST),
        isolation=("process",),
        gpu=True,
        s3_endpoints=("https://*.lan:443",),
        images=("build/*",),
        push=("registry.lan/*",),
        max_memory="2Gi",
        max_containers=100,
    )
    assert config.policy.max_memory_bytes == 2 << 30
    assert (config.source, config.data_dir) == (str(file), Path("/srv/sandfleet"))
    assert config.secrets_dir == file.parent / "secrets"


def test_the_table_is_complete_and_the_file_above_too() -> None:
    keys: list[str] = []
    sections = {"nats": NatsConfig, "node": NodeConfig, "secrets": SecretsConfig}
    more = {
        "host_api": HostApiConfig,
        "images": ImagesConfig,
        "volumes": VolumesConfig,
        "policy": PolicyConfig,
    }
    for name, section in (sections | more).items():
        for field in section.__struct_fields__:
            below = [f"tls.{part}" for part in TlsConfig.__struct_fields__] if field == "tls" else [field]
            keys += [f"{name}.{part}" for part in below]
    assert [setting.key for setting in SETTINGS] == keys
    assert len({setting.env for setting in SETTINGS}) == len(keys)
    for setting in SETTINGS:
        assert f"{setting.name} = " in WHOLE or setting.kind is Kind.GRANTS
        assert setting.doc
        assert setting.doc[0].islower() or setting.doc.split()[0] in ("JetStream", "Mach")
        assert len(setting.doc) < 90
    assert typing.get_type_hints(Config)["policy"] is PolicyConfig


# -- what goes above what


def test_file_below_environment_below_flags(load: Load) -> None:
    text = '[nats]\nurl = "nats://file"\ndomain = "file"\nstream_prefix = "file"\n'
    env = {"SANDFLEET_NATS_URL": "nats://env", "SANDFLEET_NATS_DOMAIN": "env"}
    config = load(text, env, {"nats.url": "nats://flag", "nats.domain": None})
    assert (config.nats.url, config.nats.domain, config.nats.stream_prefix) == ("nats://flag", "env", "file")
    assert config.origins["nats.url"] == "--nats"
    assert config.origins["nats.domain"] == "SANDFLEET_NATS_DOMAIN"
    assert config.origins["nats.stream_prefix"] == config.source


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("SANDFLEET_NODE", "n-1", "node.name", "n-1"),
        ("SANDFLEET_DATA_DIR", "/data", "node.data_dir", "/data"),
        ("SANDFLEET_NATS_CREDS", "/c", "nats.creds", "/c"),
        ("SANDFLEET_NATS_TLS_CA", "/ca", "nats.tls.ca", "/ca"),
        ("SANDFLEET_NATS_INSECURE", "yes", "nats.insecure", True),
        ("SANDFLEET_NATS_INSECURE", "0", "nats.insecure", False),
        ("SANDFLEET_NATS_REPLICAS", "3", "nats.replicas", 3),
        ("SANDFLEET_NODE_SLOTS", "4", "node.slots", 4),
        ("SANDFLEET_NODE_STATS_INTERVAL_S", "2.5", "node.stats_interval_s", 2.5),
        ("SANDFLEET_NODE_STATS_INTERVAL_S", "1m", "node.stats_interval_s", 60.0),
        ("SANDFLEET_NODE_ON_SHUTDOWN", "stop", "node.on_shutdown", "stop"),
        ("SANDFLEET_NODE_LABELS", "zone=a, rack=7=8", "node.labels", {"zone": "a", "rack": "7=8"}),
        ("SANDFLEET_NODE_LABELS", '{"zone": "a,b"}', "node.labels", {"zone": "a,b"}),
        ("SANDFLEET_NODE_POOLS", "a, b,", "node.pools", ("a", "b")),
        ("SANDFLEET_NODE_POOLS", '["a"]', "node.pools", ("a",)),
        ("SANDFLEET_POLICY_BIND_SOURCES", "/a,/b", "policy.bind_sources", ("/a", "/b")),
        ("SANDFLEET_POLICY_SECRETS", '{"db": ["web"]}', "policy.secrets", {"db": ("web",)}),
        ("SANDFLEET_POLICY_NETWORK", "none", "policy.network", ("none",)),
        ("SANDFLEET_POLICY_MAX_MEMORY", "512Mi", "policy.max_memory_bytes", 512 << 20),
        ("SANDFLEET_POLICY_MAX_MEMORY", "1048576", "policy.max_memory_bytes", 1 << 20),
        ("SANDFLEET_SECRETS_DIR", "/s", "secrets.dir", "/s"),
        ("SANDFLEET_HOST_API_TTL_S", "60", "host_api.ttl_s", 60.0),
    ],
)
def test_variables(variable: str, text: str, key: str, value: object) -> None:
    found: Any = load_config(None, {variable: text}, {})
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_an_empty_variable_is_not_set(load: Load) -> None:
    config = load('[node]\nname = "file"\n', {"SANDFLEET_NODE": "", "SANDFLEET_NATS_CREDS": ""})
    assert (config.node.name, config.nats.creds) == ("file", None)


def test_variables_of_containers_and_others_are_not_ours() -> None:
    others = ("TOKEN", "CONTAINER", "INSTANCE", "PORT", "API_URL", "DEBUG")
    assert (
        load_config(None, {f"SANDFLEET_{name}": "x" for name in others} | {"PATH": "/bin"}, {}).origins == {}
    )


def test_the_file_can_be_named_by_a_variable(load: Load, file: Path) -> None:
    load('[node]\nname = "a"\n')
    assert load_config(None, {"SANDFLEET_CONFIG": str(file)}, {}).node.name == "a"
    other = file.with_name("other.toml")
    other.write_text('[node]\nname = "b"\n')
    assert load_config(other, {"SANDFLEET_CONFIG": str(file)}, {}).node.name == "b"


def test_relative_paths_are_of_the_file_or_of_the_caller(
    load: Load, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = file.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load(
        '[nats]\ncreds = "c"\nnkey = "n"\n', {"SANDFLEET_NATS_NKEY": "n"}, {"nats.token_file": Path("t")}
    )
    assert (config.nats.creds, config.nats.nkey) == (str(file.parent / "c"), str(elsewhere / "n"))
    assert config.nats.token_file == str(elsewhere / "t")
    monkeypatch.chdir(file.parent)
    assert load_config(Path(file.name), {}, {}).nats.creds == str(file.parent / "c")


# -- errors


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[nats]\nurll = 1\n", "nats.urll", "did you mean 'nats.url'?"),
        ("[nats]\nbind_sources = []\n", "nats.bind_sources", "did you mean 'policy.bind_sources'?"),
        ("url = 1\n", "url", "did you mean 'nats.url'?"),
        ("[polcy]\nx = 1\n", "polcy", "did you mean 'policy'?"),
        ("[nats.tls]\nverify = false\n", "nats.tls.verify", "unknown key"),
        ('"nats.url" = "x"\n', "nats.url", "unknown key"),
        ('[nats]\n"tls.ca" = "x"\n', "nats.tls.ca", "unknown key"),
        ("[quite.different]\n", "quite", "unknown key 'quite'"),
        ("source = 'x'\n", "source", "unknown key"),
    ],
)
def test_an_unknown_key(load: Load, file: Path, text: str, key: str, hint: str) -> None:
    failure = refused(load, text)
    assert failure.field == key
    assert failure.message.startswith(f"{file}: unknown key {key!r}")
    assert hint in failure.message


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("nats = 1", "nats", "is a section: write [nats]"),
        ("[nats]\ntls = true", "nats.tls", "is a section"),
        ("[nats]\nurl = 4222", "nats.url", "nats.url: expected str, got int"),
        ("[nats]\nurl = ''", "nats.url", "is empty"),
        ("[nats]\ncreds = ''", "nats.creds", "is empty"),
        ('[nats]\nurl = "nats://a\\u0000b"', "nats.url", "has a control character"),
        ("[nats]\ninsecure = 1", "nats.insecure", "expected bool, got int"),
        ("[nats]\ninsecure = 'false'", "nats.insecure", "expected bool, got str"),
        ("[nats]\nreplicas = '3'", "nats.replicas", "expected int, got str"),
        ("[nats]\nreplicas = 3.5", "nats.replicas", "expected int"),
        ("[nats]\nreplicas = 0", "nats.replicas", "must be from 1 to 5"),
        ("[nats]\ndomain = 'a b'", "nats.domain", "is no domain"),
        ("[nats]\nstream_prefix = 'a.b'", "nats.stream_prefix", "is no prefix of stream names"),
        ("[nats.tls]\ncert = '/c'", "nats.tls.key", "nats.tls.key is missing"),
        ("[nats.tls]\nkey = '/k'", "nats.tls.cert", "nats.tls.cert is missing"),
        ("[node]\nname = 'a.b'", "node.name", "is no node name"),
        ("[node]\nlabels = {a = 1}", "node.labels[...]", "expected str, got int"),
        ("[node]\npools = 'a'", "node.pools", "expected array, got str"),
        ("[node]\npools = ['a', 1]", "node.pools[1]", "expected str, got int"),
        ("[node]\npools = ['a b']", "node.pools", "is no pool name"),
        ("[node]\nslots = 0", "node.slots", "must be from 1"),
        ("[node]\nslots = true", "node.slots", "expected int"),
        ("[node]\nisolation = 'vm'", "node.isolation", "'vm' is none of process, rootfs"),
        ("[node]\nstats_interval_s = nan", "node.stats_interval_s", "must be from 0.1"),
        ("[node]\nstats_interval_s = -1", "node.stats_interval_s", "must be from 0.1"),
        ("[node]\non_shutdown = 'leave'", "node.on_shutdown", "'leave' is none of keep, stop"),
        ("[node]\nstats_interval_s = 'soon'", "node.stats_interval_s", "is no duration"),
        ("[node]\nstats_interval_s = 1979-05-27", "node.stats_interval_s", "expected float"),
        ("[policy]\nbind_sources = ['data']", "policy.bind_sources", "entry 1 is no absolute path"),
        ("[policy]\nread = ['/a', '/b/../c']", "policy.read", "entry 2 is no absolute path"),
        ("[policy]\nwrite = ['~/x']", "policy.write", "entry 1 is no absolute path"),
        ('[policy]\nwrite = ["/x\\n"]', "policy.write", "has a control character"),
        (
            "[policy]\nnetwork = ['some']",
            "policy.network",
            "'some' is none of none, localhost, outbound, full",
        ),
        ("[policy]\nisolation = 'process'", "policy.isolation", "expected array"),
        ("[policy]\nmax_memory = '2GB'", "policy.max_memory", "is no size"),
        ("[policy]\nmax_memory = 1.5", "policy.max_memory", "expected int | str"),
        ("[policy]\nmax_memory = 0", "policy.max_memory", "policy.max_memory: "),
        ("[policy]\nmax_containers = -1", "policy.max_containers", "must be from 0"),
        ("[policy.secrets]\ndb = 'web'", "policy.secrets[...]", "expected array, got str"),
    ],
)
def test_a_wrong_value_names_key_and_file(load: Load, file: Path, text: str, field: str, words: str) -> None:
    failure = refused(load, text)
    assert failure.field == field
    assert failure.message.startswith(f"{file}: ")
    assert words in failure.message


def test_too_many_labels(load: Load) -> None:
    many = "".join(f'l{number} = "x"\n' for number in range(65))
    assert "65 labels, 64 are the most" in refused(load, f"[node.labels]\n{many}").message
    assert "larger than 8 KiB" in refused(load, f"[node.labels]\na = '{'x' * 8192}'\n").message


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            {"SANDFLEET_NATS_CRED": "x"},
            "unknown variable SANDFLEET_NATS_CRED (did you mean SANDFLEET_NATS_CREDS?)",
        ),
        ({"SANDFLEET_POLICY_ANYTHING_AT_ALL": "x"}, "unknown variable SANDFLEET_POLICY_ANYTHING_AT_ALL"),
        ({"SANDFLEET_NODE_SLOTS": "many"}, "SANDFLEET_NODE_SLOTS: node.slots: expected a whole number"),
        (
            {"SANDFLEET_NATS_INSECURE": "maybe"},
            "SANDFLEET_NATS_INSECURE: nats.insecure: expected true or false",
        ),
        ({"SANDFLEET_NODE_LABELS": "zone"}, "expected name=value,name=value"),
        ({"SANDFLEET_POLICY_SECRETS": "db=web"}, "expected JSON"),
        ({"SANDFLEET_POLICY_SECRETS": "[" * 100_000}, "expected JSON"),
        ({"SANDFLEET_NODE": "a b"}, "SANDFLEET_NODE: node.name: 'a b' is no node name"),
    ],
)
def test_a_wrong_variable_is_named(env: dict[str, str], words: str) -> None:
    with pytest.raises(Configuration) as caught:
        load_config(None, env, {})
    assert words in caught.value.message


def test_a_wrong_flag_is_named() -> None:
    with pytest.raises(Configuration, match=r"--node: node\.name: "):
        load_config(None, {}, {"node.name": "a b"})
    with pytest.raises(Configuration, match=r"unknown key 'nats\.uri'"):
        load_config(None, {}, {"nats.uri": "x"})


def test_no_value_of_a_url_is_told() -> None:
    for text in ("nats://me:hunter2@\x00", "nats://me:hunter2@host\n"):
        with pytest.raises(Configuration) as caught:
            load_config(None, {"SANDFLEET_NATS_URL": text}, {})
        assert "hunter2" not in caught.value.message


# -- files that are none


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Configuration, match=r"none\.toml cannot be read: No such file"):
        load_config(tmp_path / "none.toml", {}, {})
    with pytest.raises(Configuration, match="Is a directory"):
        load_config(tmp_path, {}, {})


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[nats", "is no TOML"),
        (b"[nats]\nurl = 'a'\nurl = 'b'\n", "is no TOML"),
        (b"a = " + b"[" * 100_000, "is no TOML"),
        (b"[node]\nname = '\xff'\n", "is no UTF-8 text (byte 15)"),
        (b"#" * (1 << 20) + b"\n\n", "is larger than 1 MiB"),
    ],
)
def test_a_file_that_cannot_be_understood(load: Load, file: Path, raw: bytes, words: str) -> None:
    message = refused(load, raw).message
    assert words in message
    assert message.startswith(str(file))


def test_a_file_that_everybody_can_write(load: Load, file: Path) -> None:
    load("")
    file.chmod(0o646)
    assert "chmod o-w" in refused(load, "").message


@given(
    st.dictionaries(
        st.text(max_size=12),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
            ),
            max_leaves=5,
        ),
        max_size=3,
    )
    | st.dictionaries(
        st.sampled_from([setting.key for setting in SETTINGS]),
        st.one_of(
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=20),
            st.lists(st.text(max_size=8), max_size=3),
            st.dictionaries(
                st.text(max_size=8),
                st.text(max_size=8) | st.lists(st.text(max_size=5), max_size=2),
                max_size=3,
            ),
        ),
        max_size=4,
    )
)
def test_whatever_is_given_the_answer_is_a_config_or_one_line(flags: dict[str, Any]) -> None:
    message = ""
    try:
        load_config(None, {}, flags)
    except Configuration as failure:
        message = failure.message
    assert "\n" not in message


# -- what grants mean


def test_patterns() -> None:
    policy = PolicyConfig(secrets={"db": ("web", "api-*")}, images=("build/*", "base:1"))
    assert [policy.may_have_secret("db", name) for name in ("web", "api-1", "webs", "API-1")] == [
        True,
        True,
        False,
        False,
    ]
    assert not policy.may_have_secret("other", "web")
    assert [policy.may_use_image(name) for name in ("build/x:1", "base:1", "base:2")] == [True, True, False]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bind_sources", "/srv/data", 'add "/srv/data" to bind_sources in the [policy] section of {}'),
        ("policy.env", 'A"B', 'add "A\\"B" to env in the [policy] section of {}'),
        ("secrets", "db", "add the service to db in the [policy.secrets] section of {}"),
        ("secrets", "a b", 'add the service to "a b" in the [policy.secrets] section of {}'),
        ("gpu", "true", "set gpu = true in the [policy] section of {}"),
        ("max_memory", "3Gi", "set max_memory to 3Gi or more in the [policy] section of {}"),
        ("max_containers", "7", "set max_containers to 7 or more in the [policy] section of {}"),
        ("nats.insecure", "true", "set insecure = true in the [nats] section of {}"),
    ],
)
def test_how_to_allow_names_line_and_file(load: Load, file: Path, key: str, value: str, words: str) -> None:
    assert load("").how_to_allow(key, value) == words.format(file)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("bind_sources", "/srv/data", '[policy] section has bind_sources = ["/srv/data"]'),
        ("secrets", "db", '[policy.secrets] section has db = ["NAME OF THE SERVICE"]'),
        ("gpu", "true", "[policy] section has gpu = true"),
        ("max_memory", "3Gi", '[policy] section has max_memory = "3Gi"'),
        ("max_containers", "7", "[policy] section has max_containers = 7"),
    ],
)
def test_how_to_allow_without_a_file(load: Load, key: str, value: str, line: str) -> None:
    assert Config().how_to_allow(key, value) == f"start the worker with --config FILE where the {line}"
    section, _, text = line.removeprefix("[").partition("] section has ")
    assert load(f"[{section}]\n{text}\n").source  # what we tell them to write can be read


def test_how_to_allow_names_the_variable_that_rules() -> None:
    config = load_config(None, {"SANDFLEET_POLICY_READ": "/a"}, {})
    assert (
        config.how_to_allow("read", "/b")
        == 'add "/b" to read in the worker\'s variable SANDFLEET_POLICY_READ'
    )


def test_the_default_data_dir() -> None:
    config = load_config(None, {}, {})
    assert config.data_dir.name == "sandfleet"
    assert config.secrets_dir == config.data_dir / "secrets"


def test_a_setting_tells_its_names() -> None:
    setting = Setting(key="nats.tls.ca", kind=Kind.PATH, doc="x")
    assert (setting.env, setting.section, setting.name) == ("SANDFLEET_NATS_TLS_CA", "nats.tls", "ca")
    assert json.dumps([setting.key for setting in SETTINGS if setting.flag]) == json.dumps(
        ["nats.url", "nats.creds", "nats.insecure", "node.name", "node.data_dir"]
    )
