"""Which mesh to talk to, and as whom."""

from dataclasses import dataclass, field

from pydantic import SecretStr

from broker.session.settings import BrokerUrl
from broker.tls import TlsSettings
from capability_schemas.errors import ConfigurationError, NotFound
from capability_schemas.ids import is_identifier
from foam.mesh import ROUTER_ID, MeshFolder, MeshRecord, Person
from foam.settings import Settings

__all__ = ["MeshAddress", "external_person", "find_mesh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshAddress:
    """A mesh and the identity to use there.

    Attributes:
        url: Broker, without credentials; of a cluster several, separated by commas.
        site: Site level of the topics.
        client: Level ``{client}`` of the topics.
        username: Name to log on with; None at a broker that asks for none.
        password: Its password.
        router: Router that answers administration.
        tls: How to check a broker with TLS.
    """

    url: str
    site: str
    client: str
    username: str | None
    password: SecretStr | None
    router: str = ROUTER_ID
    tls: TlsSettings = field(default_factory=TlsSettings)

    @property
    def urls(self) -> tuple[str, ...]:
        """The broker, or the brokers of the cluster, one by one."""
        return tuple(str(url) for url in BrokerUrl.parse_all(self.url))


def external_person(url: BrokerUrl) -> Person | None:
    """Return the credentials that stand in a broker URL.

    Raises:
        ConfigurationError: Its user name cannot be a topic level.
    """
    if url.username is None:
        return None
    if not is_identifier(url.username):
        raise ConfigurationError(
            f"user {url.username!r} in the broker URL cannot name a topic level: "
            "use A-Z a-z 0-9 _ -"
        )
    return Person(id=url.username, username=url.username, password=url.password)


def find_mesh(settings: Settings, *, admin: bool = False) -> MeshAddress:
    """Decide where to connect and as whom.

    An explicit ``url`` wins over the mesh of the data folder; explicit ``username`` and
    ``password`` win over those in the URL, and these over the ones in the data folder, which are
    used only for the mesh they belong to.

    Args:
        settings: Environment and options.
        admin: Whether administration is wanted.

    Raises:
        NotFound: No URL is given and the data folder holds no mesh.
        ConfigurationError: The URL cannot be read.
    """
    record: MeshRecord | None = None
    try:
        record = MeshFolder(settings.data).record()
    except NotFound:
        if settings.url is None:
            raise
    given = BrokerUrl.parse_all(settings.url) if settings.url is not None else ()
    url = ",".join(map(str, given)) or (record.broker if record is not None else "")
    own = (
        record
        if record is not None and BrokerUrl.parse_all(record.broker) == BrokerUrl.parse_all(url)
        else None
    )
    person = external_person(given[0]) if given else None
    if person is None and own is not None:
        person = own.admin if admin else own.device
    if settings.username is not None:
        person = Person(
            id=settings.username, username=settings.username, password=settings.password
        )
    site = settings.site or (own.site if own is not None else "local")
    return MeshAddress(
        url=url,
        site=site,
        client=person.id if person is not None else ("admin-1" if admin else "device-1"),
        username=person.username if person is not None else None,
        password=person.password if person is not None else None,
        router=own.router if own is not None else ROUTER_ID,
        tls=TlsSettings(ca_file=settings.ca),
    )
