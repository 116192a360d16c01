"""One pass over a mirror: look at both sides, decide, and bring across what must go.

Before a start everything goes, both ways; while the container runs and after it only what it has written. A pass may
be broken off at any moment and begun again: each object is whole or was not touched, and what is known is written
down as it is done.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import msgspec

from .client import TOKEN, RemoteObject, S3Client
from .decide import Action, Side, decide
from .failures import Changed, Missing, NoRoom, S3Failure, Unsettled
from .files import InTheWay, MirrorTree
from .keys import conflict_path, fold, folders_of, path_of, unusable
from .outcome import Outcome
from .patience import Patience
from .source import S3Source
from .state import Base, Intent, MirrorState, Sides, There
from .threads import side_by_side
from .transfer import PART_BYTES, Transfer

SIDE_BY_SIDE = 8
RESERVE_BYTES = 64 << 20
FETCH_PASSES = 3
GIVE_UP_AFTER = 10  # failures of objects one after the other
MAX_NOTES = 100
MAX_MARKERS = 100_000
BATCH = 1000
# A tick of the clock that files are stamped with; Linux's may be 10 ms long.
TICK_S = 0.02

_MD5 = frozenset("0123456789abcdef")
_WRITING = (Action.UPLOAD, Action.KEEP_BOTH, Action.DELETE_THERE)


class MirrorPass:
    def __init__(
        self,
        *,
        source: S3Source,
        client: S3Client,
        state: MirrorState,
        tree: MirrorTree,
        instance: str,
        fetching: bool,
        owned: bool,
        stopped: threading.Event,
        progress: Callable[[str], None] = lambda text: None,
        part_bytes: int = PART_BYTES,
        folding: bool | None = None,
        first_s: float = 0.2,
    ) -> None:
        """`fetching`: before a start. `owned`: nothing runs in the folder."""
        self._source = source
        self._client = client
        self._state = state
        self._tree = tree
        self._instance = instance
        self._fetching = fetching
        self._owned = owned
        self._progress = progress
        self._patience = Patience(stopped, first_s=first_s)
        self._folding = tree.folds() if folding is None else folding
        self._outcome = Outcome()
        self._markers: list[str] = []
        self._counting = threading.Lock()
        self._names = 0
        self._transfer = Transfer(
            client=client,
            state=state,
            tree=tree,
            prefix=source.prefix,
            patience=self._patience,
            owned=owned,
            part_bytes=part_bytes,
        )

    def run(self) -> Outcome:
        """Raises S3Failure for what could not be done, after all that could; Stopped."""
        self._settle_identity()
        self._tree.clear_incoming()
        for count in range(FETCH_PASSES):
            self._outcome.left = 0
            self._recover()
            self._look()
            self._decide()
            self._check_room()
            self._carry_out()
            if not (self._fetching and self._outcome.left):
                break
            if count == FETCH_PASSES - 1:
                raise S3Failure("the bucket keeps changing while it is being fetched", again=True)
        if self._outcome.downloaded:
            # What the container writes from now on bears another time than what was just placed.
            time.sleep(TICK_S)
        return self._outcome

    def has_changes(self) -> bool:
        """Whether the folder has what the bucket has not, without asking the bucket. Errs on the side of yes."""
        if self._state.intents():
            return True
        if self._state.get("folder") != self._tree.identity:
            return any(True for _ in self._tree.scan(self._note, owned=self._owned))
        self._state.begin_pass()
        self._look_here()
        self._state.gather()
        return any(self._differs(sides) for sides in self._state.sides())

    def _differs(self, sides: Sides) -> bool:
        if sides.here is None or sides.base is None:
            return sides.here is None or not sides.here.special
        if sides.here.special:
            return False
        try:
            here, kept = self._here(sides)
        except Unsettled:
            return True
        return here is not Side.SAME and not kept

    # -- before

    def _settle_identity(self) -> None:
        """In a folder that is not the one that was filled nothing was deleted by anybody."""
        identity = self._tree.identity
        if self._state.get("folder") != identity:
            self._state.forget_all()
            self._state.put("folder", identity)

    def _recover(self) -> None:
        """What was being sent when a worker died, or when a pass was broken off."""
        for intent in self._state.intents():
            head = self._transfer.unsend(intent)
            if head is not None:
                self._record(intent, head.etag)
            self._state.done(intent.target)

    def _look(self) -> None:
        self._state.begin_pass()
        self._look_there()
        for path, why in self._state.rule_out():
            self._note(path, why)
        self._look_here()
        self._state.gather()

    def _look_here(self) -> None:
        found = self._tree.scan(self._note, owned=self._owned)
        self._state.found_here((fold(here.path, self._folding), here) for here in found)

    def _look_there(self) -> None:
        self._markers = []
        token: str | None = None
        seen = 0
        while True:
            at = token
            objects, token = self._patience.call(lambda at=at: self._client.page(at))  # type: ignore[misc]
            folders: set[str] = set()
            usable = [there for found in objects if (there := self._usable(found)) is not None]
            for there in usable:
                folders.update(fold(above, self._folding) for above in folders_of(there.path))
            for marker in self._markers:
                folders.update(fold(above, self._folding) for above in (*folders_of(marker), marker))
            self._state.found_there((fold(there.path, self._folding), there) for there in usable)
            self._state.found_folders(folders)
            seen += len(objects)
            if token is None:
                return
            self._progress(f"{seen} objects seen")

    def _usable(self, found: RemoteObject) -> There | None:
        """An object that can have a place; a marker of a folder is remembered as such."""
        path = path_of(found.key, self._source.prefix)
        if path is None:
            return None
        why = unusable(path.removesuffix("/"))
        if why is None and path.endswith("/"):
            if len(self._markers) < MAX_MARKERS:
                self._markers.append(path.removesuffix("/"))
            return None
        if why is not None:
            self._note(path, why)
            return None
        return There(path, found.etag, found.size)

    def _note(self, path: str, why: str) -> None:
        if len(self._outcome.notes) < MAX_NOTES:
            self._outcome.notes[path] = why

    # -- deciding

    def _decide(self) -> None:
        planned: list[tuple[str, str]] = []
        for sides in self._state.sides():
            self._patience.check()
            action = self._action(sides)
            if action is not Action.NOTHING:
                planned.append((sides.fold, action.value))
            if len(planned) == BATCH:
                self._state.plan(planned)
                planned = []
        self._state.plan(planned)

    def _action(self, sides: Sides) -> Action:
        if sides.here is not None and sides.here.special:
            return Action.NOTHING  # told by the scan
        try:
            here, kept = self._here(sides)
            there = self._there(sides)
            if (here, there) == (Side.CHANGED, Side.CHANGED) and self._alike(sides):
                return Action.NOTHING
        except Unsettled:
            self._outcome.left += 1
            return Action.NOTHING
        return decide(here, there, fetching=self._fetching, readonly=self._source.readonly, kept=kept)

    def _here(self, sides: Sides) -> tuple[Side, bool]:
        """The folder's side, and whether this version stands beside another in the bucket. Unsettled."""
        here, base = sides.here, sides.base
        if here is None:
            return Side.ABSENT, False
        if base is None:
            return Side.CHANGED, False
        same = here.stamp == base.stamp and not base.racy
        if not same and here.stamp.size == base.stamp.size:
            md5, stamp, racy = self._transfer.digest(here.path)
            same = md5 == base.md5
            if same:
                self._state.know(sides.fold, msgspec.structs.replace(base, stamp=stamp, racy=racy))
        if not same or base.kept:
            return Side.CHANGED, same and bool(base.kept)
        return Side.SAME, False

    def _there(self, sides: Sides) -> Side:
        if sides.there is None:
            return Side.ABSENT
        same = sides.base is not None and sides.base.etag == sides.there.etag
        return Side.SAME if same else Side.CHANGED

    def _alike(self, sides: Sides) -> bool:
        """Both sides have come to the same bytes: known when the ETag is their MD5."""
        here, there = sides.here, sides.there
        if here is None or there is None or here.stamp.size != there.size or not _is_md5(there.etag):
            return False
        md5, stamp, racy = self._transfer.digest(here.path)
        if md5 != there.etag:
            return False
        self._state.know(sides.fold, Base(path=there.path, etag=there.etag, stamp=stamp, md5=md5, racy=racy))
        return True

    def _check_room(self) -> None:
        needed = sum(s.there.size for s in self._state.sides(Action.DOWNLOAD) if s.there is not None)
        free = self._tree.free_bytes()
        if needed and needed + RESERVE_BYTES > free:
            raise NoRoom(
                f"{needed >> 20} MiB are to be fetched, and this node's disk has {free >> 20} MiB left",
                again=True,
            )

    # -- doing

    def _carry_out(self) -> None:
        """What the bucket lacks first: then nothing that only the folder has stands in the way of the rest."""
        failures = _Failures()
        for action in (*_WRITING, Action.FORGET, Action.DELETE_HERE, Action.DOWNLOAD):
            self._run(action, failures)
        if self._fetching:
            for marker in self._markers:
                self._make_folder(marker)
        failures.raise_any()

    def _run(self, action: Action, failures: "_Failures") -> None:
        do = {
            Action.UPLOAD: self._upload,
            Action.KEEP_BOTH: self._keep_both,
            Action.DELETE_THERE: self._delete_there,
            Action.FORGET: self._forget,
            Action.DELETE_HERE: self._delete_here,
            Action.DOWNLOAD: self._download,
        }[action]
        count = 1 if action in (Action.DELETE_HERE, Action.FORGET) else SIDE_BY_SIDE
        calls = side_by_side(self._state.sides(action), do, count=count, name="s3")
        done = 0
        with contextlib.closing(calls) as ended:
            for sides, _, failure in ended:
                self._patience.check()
                if failure is None:
                    failures.none()
                    done += 1
                    self._progress(f"{done} objects: {action.value.replace('_', ' ')}")
                elif isinstance(failure, InTheWay):
                    self._note(_path(sides), str(failure))
                elif isinstance(failure, Unsettled | Changed | Missing):
                    self._outcome.left += 1
                elif isinstance(failure, S3Failure):
                    failures.add(_path(sides), failure)
                else:
                    raise failure

    def _upload(self, sides: Sides) -> None:
        assert sides.here is not None
        expected = "" if sides.there is None else sides.there.etag
        try:
            self._send(sides, sides.here.path, expected)
        except Changed:
            # Somebody was there between our looking and our writing.
            self._keep_both(sides)
        else:
            self._count("uploaded")

    def _send(self, sides: Sides, target: str, expected: str | None) -> tuple[str, Intent]:
        assert sides.here is not None
        try:
            etag, intent = self._transfer.send(sides.here.path, sides.fold, target, expected)
        except (Changed, Unsettled, Missing):
            self._state.done(target)
            raise
        # After any other failure it is not known whether the server has it: the next pass asks.
        self._record(intent, etag)
        self._state.done(target)
        return etag, intent

    def _record(self, intent: Intent, etag: str) -> None:
        """An upload is done: of the file's own object, or of a version beside it."""
        if intent.target == intent.path:
            base = Base(
                path=intent.path,
                etag=etag,
                stamp=intent.stamp,
                md5=intent.md5,
                racy=intent.racy,
                token=intent.token,
            )
        else:
            before = self._state.base(intent.fold)
            base = Base(
                path=intent.path,
                etag="" if before is None else before.etag,
                stamp=intent.stamp,
                md5=intent.md5,
                racy=intent.racy,
                kept=intent.md5,
                token="" if before is None else before.token,
            )
        self._state.know(intent.fold, base)

    def _keep_both(self, sides: Sides) -> None:
        here, base = sides.here, sides.base
        assert here is not None
        head = self._transfer.head(here.path)
        if head is None or (base is not None and base.token and head.metadata.get(TOKEN) == base.token):
            # It is gone again, or it is our own last version under an ETag that the server has changed.
            self._send(sides, here.path, "" if head is None else head.etag)
            self._count("uploaded")
            return
        target = conflict_path(here.path, self._instance)
        self._send(sides, target, None)
        self._count("uploaded")
        self._outcome.kept_both.append(target)
        if self._fetching:
            self._fetch(There(here.path, head.etag, head.size), sides.fold)

    def _delete_there(self, sides: Sides) -> None:
        assert sides.base is not None
        assert sides.there is not None
        if not self._owned and self._tree.exists(sides.base.path):
            raise Unsettled  # it was being replaced
        try:
            self._transfer.delete(sides.there.path, sides.there.etag)
            self._count("deleted_there")
        except Changed:
            pass  # a change beats a deletion: it comes with the next start
        self._state.forget(sides.fold)

    def _delete_here(self, sides: Sides) -> None:
        assert sides.here is not None
        self._tree.remove(sides.here.path)
        self._state.forget(sides.fold)
        self._count("deleted_here")

    def _forget(self, sides: Sides) -> None:
        self._state.forget(sides.fold)

    def _download(self, sides: Sides) -> None:
        assert sides.there is not None
        self._fetch(sides.there, sides.fold)

    def _fetch(self, there: There, sides_fold: str) -> None:
        with self._counting:
            self._names += 1
            name = str(self._names)
        self._transfer.fetch(there, sides_fold, name)
        self._count("downloaded")

    def _count(self, name: str) -> None:
        with self._counting:
            setattr(self._outcome, name, getattr(self._outcome, name) + 1)

    def _make_folder(self, path: str) -> None:
        try:
            self._tree.make_folder(path)
        except InTheWay as failure:
            self._note(path, str(failure))


class _Failures:
    """Of single objects. Raises the failure once it looks as if nothing worked."""

    def __init__(self) -> None:
        self._first: tuple[str, S3Failure] | None = None
        self._count = 0
        self._in_a_row = 0
        self._again = True

    def none(self) -> None:
        self._in_a_row = 0

    def add(self, path: str, failure: S3Failure) -> None:
        self._first = self._first or (path, failure)
        self._count += 1
        self._in_a_row += 1
        self._again = self._again and failure.again
        if self._in_a_row == GIVE_UP_AFTER or isinstance(failure, NoRoom):
            self.raise_any()

    def raise_any(self) -> None:
        if self._first is None:
            return
        path, failure = self._first
        more = f" (and {self._count - 1} more)" if self._count > 1 else ""
        kind = NoRoom if isinstance(failure, NoRoom) else S3Failure
        raise kind(f"{_shown(path)}: {failure}{more}", again=self._again) from failure


def _path(sides: Sides) -> str:
    known = sides.here or sides.there or sides.base
    return "" if known is None else known.path


def _shown(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:200]}…"


def _is_md5(etag: str) -> bool:
    return len(etag) == 32 and _MD5.issuperset(etag)
