"""The coordinator's certificates: what they say, when they are renewed, what TLS makes of them."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.errors import Code, StorageError
from common.world import unix_seconds
from server.config import CoordinatorConfig
from server.pki import ensure_certificate, make_authority

DAY = 86400


def config(*names: str) -> CoordinatorConfig:
    told = {"format": "wardround-coordinator/1", "state": "s", "names": names or ("localhost",)}
    return CoordinatorConfig.model_validate(told)


@pytest.fixture
def now() -> int:
    return unix_seconds()


@pytest.fixture
def state(tmp_path: Path, now: int) -> Path:
    assert make_authority(tmp_path, "Lake", now)
    return tmp_path


def loaded(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_authority_may_sign_certificates_and_nothing_else_for_ten_years(state, now) -> None:
    ca = loaded(state / "tls/ca.crt")
    basic = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value == x509.KeyUsage(
        False, False, False, False, False, True, False, False, False
    )
    assert ca.public_key().curve.name == "secp256r1"
    assert ca.not_valid_after_utc.timestamp() == now + 3650 * DAY
    assert ca.issuer == ca.subject


def test_the_servers_certificate_is_for_its_names_and_for_servers_only(state, now) -> None:
    made = ensure_certificate(state, config("wr.example.org", "10.0.0.7", "::1"), now)
    cert = loaded(made.cert)
    assert made.renewed
    assert made.expires == cert.not_valid_after_utc.timestamp() == now + 90 * DAY
    assert cert.not_valid_before_utc.timestamp() == now - 7 * DAY
    san = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(san) == [
        x509.DNSName("wr.example.org"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.7")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    extended = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.SERVER_AUTH]
    basic = cert.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca) == (True, False)
    cert.verify_directly_issued_by(loaded(state / "tls/ca.crt"))


def test_a_certificate_is_renewed_when_thirty_days_are_left_and_not_before(state, now) -> None:
    first = ensure_certificate(state, config(), now)
    later = ensure_certificate(state, config(), now + 60 * DAY - 1)
    assert not later.renewed
    assert later.cert.read_bytes() == first.cert.read_bytes()
    renewed = ensure_certificate(state, config(), now + 60 * DAY)
    assert renewed.renewed
    assert renewed.expires == now + 150 * DAY


def test_a_renewal_never_touches_the_authority_or_the_servers_key(state, now) -> None:
    ensure_certificate(state, config(), now)
    kept = {n: (state / "tls" / n).read_bytes() for n in ("ca.crt", "ca.key", "server.key")}
    before = loaded(state / "tls/server.crt").serial_number
    assert ensure_certificate(state, config(), now, force=True).renewed
    assert loaded(state / "tls/server.crt").serial_number != before
    assert {n: (state / "tls" / n).read_bytes() for n in kept} == kept
    assert not make_authority(state, "Lake", now + 1)
    assert (state / "tls/ca.crt").read_bytes() == kept["ca.crt"]


@pytest.mark.parametrize("damage", ["names", "garbage", "other-key", "other-ca", "missing"])
def test_a_certificate_that_does_not_fit_is_made_anew(state, now, damage, tmp_path_factory) -> None:
    path = ensure_certificate(state, config(), now).cert
    wanted = config("other.example") if damage == "names" else config()
    if damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage == "other-key":
        (state / "tls/server.key").unlink()
    elif damage == "other-ca":
        other = tmp_path_factory.mktemp("other")
        make_authority(other, "Lake", now)
        (other / "tls/server.key").write_bytes((state / "tls/server.key").read_bytes())
        (other / "tls/server.key").chmod(0o600)
        path.write_bytes(ensure_certificate(other, config(), now).cert.read_bytes())
    elif damage == "missing":
        path.unlink()
    assert ensure_certificate(state, wanted, now).renewed
    assert not ensure_certificate(state, wanted, now).renewed


def test_no_certificate_outlives_the_authority_and_none_is_made_after_it(state, now) -> None:
    made = ensure_certificate(state, config(), now + 3640 * DAY)
    assert made.expires == now + 3650 * DAY
    with pytest.raises(StorageError) as caught:
        ensure_certificate(state, config(), now + 3650 * DAY)
    assert caught.value.code is Code.CERTIFICATE_UNUSABLE


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("ca.key", None, Code.KEY_FILE_DAMAGED),
        ("ca.key", b"garbage", Code.KEY_FILE_DAMAGED),
        ("ca.crt", b"garbage", Code.CERTIFICATE_UNUSABLE),
        ("ca.crt", None, Code.NOT_INITIALISED),
        ("server.key", b"garbage", Code.KEY_FILE_DAMAGED),
    ],
)
def test_a_damaged_authority_is_refused_and_never_replaced(state, now, name, content, code) -> None:
    path = state / "tls" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(StorageError) as caught:
        ensure_certificate(state, config(), now)
    assert caught.value.code is code
    if name == "ca.key":
        with pytest.raises(StorageError):
            make_authority(state, "Lake", now)
    assert content is None or path.read_bytes() == content


def test_a_certificate_of_another_authoritys_key_is_refused(state, now, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    make_authority(other, "Lake", now)
    (state / "tls/ca.crt").write_bytes((other / "tls/ca.crt").read_bytes())
    with pytest.raises(StorageError) as caught:
        ensure_certificate(state, config(), now)
    assert caught.value.code is Code.CERTIFICATE_UNUSABLE


# ---------------------------------------------------------------------------------- TLS


def shake(state: Path, ca: Path, name: str) -> str | None:
    """The TLS version that a hospital which trusts `ca` agrees on with the coordinator."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    server.load_cert_chain(state / "tls/server.crt", state / "tls/server.key")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    client.load_verify_locations(ca)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].version()


def test_a_hospital_that_pins_the_authority_reaches_every_name(state, now) -> None:
    ensure_certificate(state, config("localhost", "127.0.0.1"), now)
    for name in ("localhost", "127.0.0.1"):
        assert shake(state, state / "tls/ca.crt", name) == "TLSv1.3"


def test_another_authority_another_name_and_an_old_certificate_are_refused(
    state, now, tmp_path_factory
) -> None:
    ensure_certificate(state, config(), now)
    other = tmp_path_factory.mktemp("other")
    make_authority(other, "Lake", now)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(state, other / "tls/ca.crt", "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch"):
        shake(state, state / "tls/ca.crt", "evil.example")
    ensure_certificate(state, config(), now - 91 * DAY, force=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake(state, state / "tls/ca.crt", "localhost")


def test_a_hospital_whose_clock_is_days_behind_still_gets_an_answer(state, now) -> None:
    # Made "in the future": what the certificate looks like to a clock that is behind.
    ensure_certificate(state, config(), now + 6 * DAY)
    assert shake(state, state / "tls/ca.crt", "localhost") == "TLSv1.3"
    ensure_certificate(state, config(), now + 8 * DAY, force=True)
    with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
        shake(state, state / "tls/ca.crt", "localhost")


def test_the_servers_certificate_cannot_sign_another(state, now, tmp_path_factory) -> None:
    """A thief of the server's key cannot make certificates that hospitals believe."""
    ensure_certificate(state, config(), now)
    thief = tmp_path_factory.mktemp("thief")
    make_authority(thief, "Lake", now)
    (thief / "tls/ca.crt").write_bytes((state / "tls/server.crt").read_bytes())
    (thief / "tls/ca.key").write_bytes((state / "tls/server.key").read_bytes())
    made = ensure_certificate(thief, config("evil.example"), now)
    made.cert.write_bytes(made.cert.read_bytes() + (state / "tls/server.crt").read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(thief, state / "tls/ca.crt", "evil.example")
