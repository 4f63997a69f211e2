"""Members of a site with keys and passports, as a registry would have vouched for them."""

from capability_schemas.passport import Passport, PassportBook, issue
from capability_schemas.provenance import Signer
from capability_schemas.signing import SigningKey

DAY_MS = 86_400_000
REGISTRY_KEY = SigningKey.generate()


def passport_of(identity, role, key, *, now, registry_key=REGISTRY_KEY, **fields):
    passport = Passport(
        identity=identity,
        role=role,
        site="local",
        public_key=key.public,
        registry="registry-1",
        **{"issued_at": now - 1_000, "expires_at": now + 30 * DAY_MS, **fields},
    )
    return issue(passport, registry_key)


def make_signer(identity, role, *, now, key=None, **fields):
    key = key or SigningKey.generate()
    return Signer(
        identity=identity, key=key, passport=passport_of(identity, role, key, now=now, **fields)
    )


def make_book(clock):
    return PassportBook(site="local", registries={"registry-1": REGISTRY_KEY.public}, clock=clock)
