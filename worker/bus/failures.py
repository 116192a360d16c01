"""What the bus raises, all of it in the tree of `worker.errors`. No exception of nats-py leaves this package.

Unavailable
├── NotConnected       there is no connection now, or it broke before the answer came
├── NoResponders       nobody listens on the subject: the node is not there, or JetStream is off
├── NoAnswer           no answer within the time given; whether it was done is unknown
└── JetStreamError     JetStream answered with an error: `status` (HTTP-like) and `err_code`
"""

from worker.errors import Unavailable


class NotConnected(Unavailable):
    """Nothing is buffered while there is no connection: the caller decides what to do again."""


class NoResponders(Unavailable):
    pass


class NoAnswer(Unavailable):
    pass


class JetStreamError(Unavailable):
    """Codes: https://github.com/nats-io/nats-server/blob/main/server/errors.json"""

    WRONG_LAST_SEQUENCE = 10071
    WRONG_LAST_SEQUENCE_CONSTANT = 10164
    STREAM_NOT_FOUND = 10059
    STREAM_NAME_IN_USE = 10058
    SUBJECT_OVERLAP = 10065
    CONSUMER_EXISTS = 10148
    CONSUMER_NOT_FOUND = 10014
    STORE_FAILED = 10077  # a full stream that discards what is new, mostly
    JETSTREAM_NOT_ENABLED = 10076
    JETSTREAM_NOT_ENABLED_FOR_ACCOUNT = 10039
    ATOMIC_DISABLED = 10174
    ATOMIC_INCOMPLETE = 10176
    ATOMIC_TOO_MANY = 10210
    NO_PEERS = 10005
    NO_LEADER = 503

    def __init__(self, status: int, err_code: int, description: str, *, subject: str = "") -> None:
        where = f" ({subject})" if subject else ""
        super().__init__(f"JetStream: {description} [{err_code or status}]{where}")
        self.status = status
        self.err_code = err_code
        self.description = description

    @property
    def jetstream_off(self) -> bool:
        return self.err_code in (self.JETSTREAM_NOT_ENABLED, self.JETSTREAM_NOT_ENABLED_FOR_ACCOUNT)

    @property
    def passing(self) -> bool:
        """There is no leader (yet), or too few servers to place a stream: both may change."""
        return self.status == self.NO_LEADER or self.err_code == self.NO_PEERS

    @property
    def refused_sequence(self) -> bool:
        """Another message was stored, or is being stored, where ours was expected to be the next."""
        return self.err_code in (self.WRONG_LAST_SEQUENCE, self.WRONG_LAST_SEQUENCE_CONSTANT)
