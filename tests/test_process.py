"""Process: stop signals wait for a clean-up, and none is lost."""

import signal
import threading

import pytest

from atomtune.process import signals_wait


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows lacks these signals")
def test_signals_wait_for_the_end_and_then_reach_the_handlers_from_before():
    heard: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: heard.append(number))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with pytest.raises(ZeroDivisionError), signals_wait():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.raise_signal(number)
            assert heard == []
            raise ZeroDivisionError
        assert heard == [signal.SIGTERM, signal.SIGUSR1]
        signal.raise_signal(signal.SIGTERM)
        assert len(heard) == 3
    finally:
        for number, handler in {**before, signal.SIGHUP: ignored}.items():
            signal.signal(number, handler)


def test_a_clean_up_in_another_thread_leaves_the_signals_alone():
    handler, inside = signal.getsignal(signal.SIGINT), []

    def clean_up() -> None:
        with signals_wait():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=clean_up)
    thread.start()
    thread.join()
    assert inside == [handler]
