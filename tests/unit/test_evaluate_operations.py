"""The hierarchy of operations, their old spellings, and the forms that make rules."""

import pytest

from worker.platform.darwin import sbpl_operations as operations
from worker.platform.darwin.evaluate import Argument, evaluate

B = "(version 1)(deny default)"


class TestHierarchy:
    def test_every_operation_leads_to_the_default(self) -> None:
        for name in operations.PARENTS:
            nodes = operations.chain(name)
            assert nodes[-1] == "default"
            assert len(set(nodes)) == len(nodes)
            assert all(node in operations.PARENTS for node in nodes[:-1])

    def test_every_other_name_is_one_of_them(self) -> None:
        assert set(operations.ALIASES.values()) <= set(operations.PARENTS)
        assert not set(operations.ALIASES) & set(operations.PARENTS)
        for names in (operations.SINCE, operations.ALLOWED_BY_DEFAULT, operations.UNSETTLED_BY_DEFAULT):
            assert set(names) <= set(operations.PARENTS)

    @pytest.mark.parametrize("name", sorted(operations.PARENTS))
    def test_a_rule_on_it_decides_it_and_not_its_sibling(self, name: str) -> None:
        assert evaluate(f"{B}(allow {name})", {}, name).decision == "allow"
        assert evaluate(f"(version 1)(allow default)(deny {name})", {}, name).decision == "deny"

    @pytest.mark.parametrize("name", sorted(operations.PARENTS))
    def test_what_the_default_says(self, name: str) -> None:
        found = evaluate(B, {}, name).decision
        nodes = set(operations.chain(name))
        if nodes & operations.ALLOWED_BY_DEFAULT:
            assert found == "allow"
        else:
            assert found == ("unknown" if nodes & operations.UNSETTLED_BY_DEFAULT else "deny")

    @pytest.mark.parametrize(
        ("written", "asked"),
        [
            ("process-exec", "process-exec-interpreter"),
            ("process-exec*", "process-exec"),
            ("ipc-posix-sem", "ipc-posix-sem-create"),
            ("ipc-posix-shm", "ipc-posix-shm-write-unlink"),
            ("iokit-open", "iokit-open-user-client"),
            ("file-unlink", "file-write-unlink"),
            ("user-preference*", "managed-preference-read"),
            ("network*", "network-bind"),
            ("mach*", "mach-priv-task-port"),
            ("default", "signal"),
        ],
    )
    def test_old_spellings_and_wildcards(self, written: str, asked: str) -> None:
        assert evaluate(f"{B}(allow {written})", {}, asked).decision == "allow"

    def test_constants_and_branches(self) -> None:
        text = """(version 1)
        (define home "/Users/w")
        (define mine (require-any (subpath home) (literal "/b")))
        (deny default)
        (when (param "READ") (allow file-read* mine))
        (if (param "WRITE") (allow file-write* (subpath (string-append home "/out"))) (deny file-write* mine))
        (allow file-ioctl (literal (if (param "TTY") (param "TTY") "/dev/tty")))
        """
        asked = Argument(path="/Users/w/out/x")
        given = {"READ": "", "WRITE": "yes"}
        assert evaluate(text, given, "file-read-data", asked).decision == "allow"
        assert evaluate(text, {}, "file-read-data", asked).decision == "deny"
        assert evaluate(text, given, "file-write-data", asked).decision == "allow"
        assert evaluate(text, {}, "file-write-data", asked).decision == "deny"
        assert evaluate(text, {}, "file-ioctl", Argument(path="/dev/tty")).decision == "allow"
        assert (
            evaluate(text, {"TTY": "/dev/ttys001"}, "file-ioctl", Argument(path="/dev/tty")).decision
            == "deny"
        )
