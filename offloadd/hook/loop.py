"""What both hooks do: answer a build daemon's requests until one was accepted, or there are no more."""

from __future__ import annotations

from offloadd.hook.relay import Input, Real, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from offloadd.hook.ask import Answer

ACCEPT, DECLINE, POSTPONE = b"# accept\n", b"# decline\n", b"# postpone\n"


class Request:
    """One derivation that wants a machine.

    Args:
        raw: the request as it came, which the real program gets.
        system: empty: our daemon would not understand it, and is not asked.
        local: whether the build daemon could build it itself now.
    """

    def __init__(self, raw: bytes, system: str = "", features: Sequence[str] = (), *, local: bool = False) -> None:
        self.raw = raw
        self.system = system
        self.features = features
        self.local = local


class Hook:
    """One hook.  Each of the two says how requests are read, and how the real program is talked to.

    Args:
        command: the real program with its arguments.
        configuration: the build daemon's configuration directory, which has the copies of our client keys.
    """

    daemon = ""
    """`guix` or `nix`."""
    out = 1
    """Where the build daemon listens."""

    def __init__(self, command: Sequence[str], inlet: Input, configuration: str) -> None:
        self.command = command
        self.inlet = inlet
        self.configuration = configuration
        self.plain: Real | None = None
        """The real program with the user's own machines."""
        self._warned = False
        self._accepted = False

    def receive(self) -> Request | None:
        """Wait for the next request; None when there is none."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Begin what can go on while our daemon is asked."""

    def try_plain(self, request: Request, *, alone: bool) -> int | None:
        """As without us.  The status when that accepted the build and has done it.

        Args:
            alone: our daemon is absent.
        """
        raise NotImplementedError

    def hand_over(self, answer: Answer, request: Request) -> int | None:
        """To the real program, which is to know of that one machine only.  The same."""
        raise NotImplementedError

    def serve(self) -> int:
        """Answer; the exit status."""
        while (request := self.receive()) is not None:
            answer = None
            try:
                self.prepare()
                answer = self._ask(request)
                status = self._answer(answer, request)
            except OSError as exc:  # no room for a file, or no such program
                if self._accepted:
                    raise
                # Without an answer the build daemon would have the build fail.
                status = None
                write_all(self.out, f"offload: {exc}\n".encode() + DECLINE)
            if answer is not None:
                answer.release()
            if status is not None:
                return status
        if self.plain is not None:
            self.plain.close()
        return 0

    def _ask(self, request: Request) -> Answer | None:
        """None: we have to do without our daemon."""
        if not request.system:
            return None
        # To load it takes as long as to ask: meanwhile what was prepared goes on.
        from offloadd.hook.ask import Unanswered, ask, copied_keys

        keys = copied_keys(self.configuration)
        try:
            return ask(self.daemon, request.system, list(request.features), local=request.local, keys=keys)
        except Unanswered as exc:
            if not exc.absent and not self._warned:
                self._warned = True
                write_all(self.out, f"offload: {exc}\n".encode())
            return None

    def _answer(self, answer: Answer | None, request: Request) -> int | None:
        """The build's status when it was accepted, and is done."""
        if answer is None or answer.decision == "decline":
            return self.try_plain(request, alone=answer is None)
        if answer.decision == "accept":
            return self.hand_over(answer, request)
        write_all(self.out, POSTPONE)
        return None

    def accept(self, real: Real) -> int:
        """The status of the build, which the real program does now."""
        if self.plain is not None and self.plain is not real:
            self.plain.close()
        self._accepted = True
        write_all(self.out, ACCEPT)
        return real.relay(self.inlet)
