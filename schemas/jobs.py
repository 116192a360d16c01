"""The message on `P.job.<pool>.<job_id>`: a spec that one node of the pool is to run to its end."""

from datetime import datetime
from typing import Annotated

import msgspec

from .decode import check_actor, check_seconds, strict_decode, utc
from .errors import InvalidCommand
from .spec_model import ServiceSpec
from .values import check_service, shorten


class Job(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag_field="type",
    tag="job",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """`timeout_s` is the longest time that one attempt may take; past `deadline` none is begun."""

    job_id: str
    spec: ServiceSpec
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    deadline: datetime | None = None
    timeout_s: float | None = None
    actor: str | None = None


def decode_job(body: bytes, *, job_id: str | None = None) -> Job:
    """The job in `body`; `job_id` is that of its subject. Errors as for a command."""
    job = strict_decode(body, Job)
    check_service(job.job_id, field="job_id")
    if job_id is not None and job.job_id != job_id:
        raise InvalidCommand(
            f"{shorten(job.job_id)} differs from {shorten(job_id)} of the subject", field="job_id"
        )
    check_actor(job.actor)
    check_seconds(job.timeout_s, field="timeout_s")
    return msgspec.structs.replace(job, deadline=utc(job.deadline, field="deadline"))
