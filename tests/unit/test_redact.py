# SPDX-License-Identifier: Apache-2.0
"""Secrets are taken out of what is said, and nothing else is."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_mpi.common.redact import MASK, NO_SECRET, Redactor, redact, secret_values

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJuMSJ9.c2lnbmF0dXJl-_x"
SEED = "SU" + "A2B3C4D5" * 7
PEM = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIIGH7p1v3k2h\nAAAAbase64moreAAAA==\n-----END EC PRIVATE KEY-----"

SECRET_TEXTS = [
    ("HF_TOKEN=hf_abcdefghijABCDEFGHIJ0123456789abcd", "hf_abc"),
    ("can't fetch with hf_abcdefghijABCDEFGHIJ0123456789abcd, gave up", "hf_abc"),
    ("npm_" + "Ab1" * 12 + " refused", "Ab1Ab1"),
    ("image pull with dckr_pat_" + "aB3_-" * 5, "aB3_-"),
    ("charged by sk_live_" + "Ab1Cd2" * 4, "Ab1Cd2"),
    ("key nvapi-AbC_d-0123456789abcdef0123 refused", "nvapi-"),
    ("AKIAIOSFODNN7EXAMPLE", "AKIA"),
    ("AWS_SECRET_ACCESS_KEY=/alrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "FEMI"),
    ("Authorization: Bearer abcdefg.hijk", "abcdefg"),
    ("-H 'authorization: Basic dXNlcjpodW50ZXIy'", "dXNl"),
    ("sent bearer Abc123def456", "Abc123"),
    ('{"password": "hunter two", "host": "n1"}', "hunter"),
    ('"{\\"api_key\\": \\"abc def\\"}"', "abc def"),
    ("{'hf_token': 'zzz yyy'}", "zzz"),
    ('password="a\\"b c"', "b c"),
    ('password="never closed', "closed"),
    ("password: hunter2", "hunter2"),
    ("ETCD_AUTH_PASSWORD=a,b;c", "b;c"),
    ("NATS_AUTH_TOKEN = s3cr3t!", "s3cr3t"),
    ('auth: Some("x9"), password: Some("h2")', "h2"),
    ("--api-key sesame1 --tp-size 8", "sesame1"),
    ("['--hf-token', 'sesame1']", "sesame1"),
    ("--password=sesame1", "sesame1"),
    ("TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY=00ff00ff", "00ff"),
    ("clientSecret: xyz", "xyz"),
    ("got a token: abcdefgh", "abcdefgh"),
    ("new_token=abc", "=abc"),
    ("https://x/y?access_token=abc123&z=1", "abc123"),
    ("nats://user:p4ss@10.0.0.1:4222", "p4ss"),
    ("nats://onlytoken@10.0.0.1:4222", "onlytoken"),
    ("http://user:pa/ss@host/path", "pa/ss"),
    ("http://user:pa@ss@host/path", "ss@"),
    (f"jwt {JWT} refused", "eyJ"),
    (f"seed {SEED} given", "A2B3"),
    (f"before\n{PEM}\nafter", "MHcC"),
    ("MHcCAQEEIIGH7p1v3k2h\nAAAAbase64moreAAAA==\n-----END EC PRIVATE KEY-----\nafter", "MHcC"),
    ("-----BEGIN PRIVATE KEY-----\nMHcCAQEEIIGH7p1v3k2h", "MHcC"),
    (
        f"-----BEGIN NATS USER JWT-----\nxyz\n------END NATS USER JWT------\n-----BEGIN USER NKEY SEED-----\n{SEED[:40]}",
        "xyz",
    ),
]

PLAIN_TEXTS = [
    "num_key_value_heads: 8, num_key_value_heads=8",
    "max_tokens: 5, max_num_tokens=8192, tokens_per_block: 32",
    "verdict 1.33 s, load 1.56 s, ready 4.12 s, first token 0.16 s, 30.9 tokens/s",
    "first token: 0.16 s, time per token: 3.2ms, tokens: [1, 2]",
    "eos_token: </s>, 'pad_token': '<pad_of_this>', eos_token_id=2, tokenizer=/models/M/tokenizer.json",
    "unexpected token: '}' at line 3",
    "3 keys gone, key: value, lease 7587 revoked, kv_cache_config: {free_gpu_memory_fraction: 0.9}",
    "without credentials: every process that can reach etcd and NATS can use them",
    "an IPv4 --address, or --credentials none",
    "etcd refused the password; correct ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD",
    "ETCD_AUTH_CLIENT_KEY=/run/user/0/etcd.key, private_key: /etc/ssl/key.pem, NATS_AUTH_CREDENTIALS_FILE=/x/y.creds",
    "etcd at http://10.213.77.1:2379/v3?a=b@c does not answer",
    "mail a@b.example about https://github.com/ai-dynamo/dynamo",
    "hf_quant_config.json and model-00001-of-00010.safetensors in /models/hf_models/sk-net",
    "Basic authentication is off, Bearer tokens are not used",
    "password: None, token: null, api_key=''",
    "--token and --password are read from the environment",
    "dynamo_mpi: rank 13 on n03: error in load: RuntimeError: CUDA out of memory",
    "seed: 42, random_seed=1234567",
]


@pytest.mark.parametrize(("text", "secret"), SECRET_TEXTS)
def test_secrets_go(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert MASK in redact(text)


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_what_an_operator_needs_stays(text: str) -> None:
    assert redact(text) == text


def test_what_is_around_a_secret_stays() -> None:
    assert redact("nats://user:p4ss@10.0.0.1:4222/x refused") == f"nats://{MASK}@10.0.0.1:4222/x refused"
    assert redact(f"before\n{PEM}\nafter") == f"before\n{MASK}\nafter"
    assert redact('{"password": "hunter2", "host": "n1"}') == f'{{"password": "{MASK}", "host": "n1"}}'
    assert redact("--api-key sesame1 --tp-size 8") == f"--api-key {MASK} --tp-size 8"
    assert redact("https://x/y?access_token=abc123&z=1") == f"https://x/y?access_token={MASK}&z=1"


ENVIRON = {
    "ETCD_AUTH_PASSWORD": "correct horse",
    "NATS_SERVER": "nats://me:battery@n1:4222",
    "NATS_AUTH_USERNAME": "dynamo",
    "HF_TOKEN": "staple9",
    "SLURM_JWT": "not-even-one",
    "X_TOKEN": "abc",
    "A_TOKEN": "x",
    "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY": "0011aabb",
    "ETCD_AUTH_CLIENT_KEY": "/run/etcd.key",
    "ETCD_AUTH_USERNAME": "worker",
    "EOS_TOKEN": "</s>",
    "MAX_TOKENS": "8192",
    "TOKENIZERS_PARALLELISM": "false",
    "DYN_MPI_CREDENTIALS": "none",
    "MODEL_PATH": "/models/M",
    "DB_PASSWORD": '/a"b\\c%',
}


def test_values_of_the_environment_go() -> None:
    redactor = Redactor.of(ENVIRON)
    text = 'said correct horse, battery, "staple9" and 0011aabb; abc but abcdef, dynamo worker of /models/M: x </s> none 8192 /run/etcd.key'
    assert redactor.redact(text) == (
        f'said {MASK}, {MASK}, "{MASK}" and {MASK}; {MASK} but abcdef, dynamo worker of /models/M: x </s> none 8192 /run/etcd.key'
    )
    assert redactor.redact('as JSON /a\\"b\\\\c%, in a URL %2Fa%22b%5Cc%25, itself /a"b\\c%') == (
        f"as JSON {MASK}, in a URL {MASK}, itself {MASK}"
    )


def test_a_secret_may_be_a_part_of_the_mask() -> None:
    redactor = Redactor(["redacted", "<redact", MASK])
    assert redactor.redact("redacted <redact") == f"{MASK} {MASK}"


_ODD = st.lists(
    st.sampled_from(
        [text for text, _ in SECRET_TEXTS]
        + ["password", "token", "secret", "=", ": ", '"', "'", "\\", "://", "@", ":", "--", " ", "\n", "Bearer ", MASK]
        + ["<redacted", ">", "api_key", "-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----", "a1b2c3d4", ","]
    )
).map("".join)


@given(st.one_of(st.text(), _ODD))
def test_twice_is_once(text: str) -> None:
    once = redact(text)
    assert redact(once) == once
    redactor = Redactor(["redacted", "a1b2c3d4", "secret", "ass"])
    once = redactor.redact(text)
    assert redactor.redact(once) == once


@given(st.text(), st.text(st.characters(codec="utf-8"), min_size=6), st.text())
def test_a_known_value_never_comes_through(before: str, value: str, after: str) -> None:
    value = value.strip()
    if len(value) >= 6 and value not in MASK:
        said = Redactor([value]).redact(f"{before}{value}{after}")
        assert value not in said.replace(MASK, "\0")


_NAMED_VALUES = st.text(st.characters(categories=["Lu", "Ll", "Nd"], codec="ascii"), min_size=3)


@given(_NAMED_VALUES.filter(lambda value: not NO_SECRET.compiled.fullmatch(value)))
def test_a_named_value_never_comes_through(value: str) -> None:
    for form in ("db_password={}", '"password": "{}"', "apiKey: {}", "--secret={}", "http://me:{}@host/"):
        assert redact(form.format(value)) == form.format(MASK) or form.startswith("http")
    assert redact(f"http://me:{value}@host/") == f"http://{MASK}@host/"


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "token",
        "token:",
        "password=",
        "password=)",
        'password="',
        "\\",
        "-",
        "--a",
        "://",
        "://a:b",
        ":",
        "eyJ",
        "eyJabcdefgh.",
        "hf_",
        "sk-",
        "-----BEGIN PRIVATE KEY-----",
        "-----END PRIVATE KEY-----\n",
        "-----END PRIVATE KEY-----",
        "AAAAAAAAAAAAAAAAA\n",
        "Bearer ",
        "authorization:",
        "@",
        "://@",
        '\\"',
        " ",
    ],
)
def test_time_grows_with_the_text_alone(piece: str) -> None:
    require_quick(piece * (200_000 // len(piece)))


def test_a_long_url_takes_no_longer() -> None:
    require_quick("://" + "a@" * 100_000)


def require_quick(text: str) -> None:
    began = time.process_time()
    redact(text)
    # quadratic time would be minutes
    assert time.process_time() - began < 10.0


def test_secret_values_are_found_by_their_names() -> None:
    assert set(secret_values(ENVIRON)) >= {"not-even-one", "correct horse", "battery", "staple9", "0011aabb"}
    assert not {"dynamo", "worker", "8192", "none", "/run/etcd.key", "</s>"} & set(secret_values(ENVIRON))


def test_the_working_directory_is_no_password() -> None:
    assert not list(secret_values({"PWD": "/my runs/tp=8", "OLDPWD": "/my runs"}))
    assert list(secret_values({"MYSQL_PWD": "battery"})) == ["battery"]
