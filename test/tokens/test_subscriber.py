"""`TokenSubscriber` over DDS: restarts, requests, callbacks, names, endings."""

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
from fake_tokenizer import MODEL, make_tokens
from ros_harness import RosProcess, free_domain, ros_environment, wait_until

from vla_perception.tokens import (
    FORMAT,
    FingerprintMismatchError,
    TokenFormatError,
    TokenSubscriber,
    to_message,
)
from vla_perception.tokens.encode_service import FINAL

OTHER = "cd" * 32


def test_reading_needs_neither_torch_nor_ros():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['rclpy'] = None\n"
        "import vla_perception\nfrom vla_perception.tokens import TokenSubscriber, VisualTokens, from_message\n"
        "assert not {'timm', 'torchvision', 'cv2', 'PIL'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ros_environment(0), timeout=60)


def matched(publisher, count=1):
    wait_until(lambda: publisher.get_subscription_count() >= count, 20.0, "a match of publisher and subscriber")


@pytest.mark.ros
def test_plain_loop_another_process_and_its_restart(ros):
    count = 10  # no more than the depth of both queues: none is lost on the way, however busy the machine is
    with TokenSubscriber(ros.node(), history=3) as tokens:
        with ros.fake("--rate", 50, "--count", count, "--skip", 5, 6, "--cameras", "front", "wrist") as fake:
            sequences = []
            while not sequences or sequences[-1] < 11:
                visual = tokens.wait(20.0)
                assert visual.cameras == ("front", "wrist") and visual.valid == (True, True)
                assert (visual.numpy() == visual.sequence).all()
                assert 0.0 <= tokens.age(visual) < 5.0
                sequences.append(visual.sequence)
            assert sequences == sorted(set(sequences))
            assert (tokens.received, tokens.lost, tokens.gaps, tokens.restarts) == (count, 2, 1, 0)
            assert [t.sequence for t in tokens.history] == [9, 10, 11]
            assert not visual.data.flags.writeable
            assert fake.stop() == 0
        with pytest.raises(TimeoutError, match="/tokens has no publisher"):
            wait_until(lambda: not tokens.publishers(), 20.0, "the publisher gone")
            tokens.wait(0.1)
        # Numbers go on as if 38 had been lost, but they are another process's.
        with ros.fake("--rate", 50, "--count", 2, "--first", 50):
            assert tokens.wait(20.0).sequence >= 50
            wait_until(lambda: tokens.received == count + 2, 20.0, "two sets of the second process")
            assert (tokens.lost, tokens.restarts) == (2, 1)
        with ros.fake("--rate", 50, "--count", 3):
            wait_until(lambda: tokens.received == count + 5, 20.0, "three sets of the third process")
            assert (tokens.lost, tokens.restarts) == (2, 2)


@pytest.mark.ros
def test_the_successor_of_a_killed_publisher_is_no_loss_and_no_second_one(ros, monkeypatch):
    """DDS still lists the killed one: nobody has said that it has gone."""
    told = []
    monkeypatch.setattr(TokenSubscriber, "_log", lambda _self, text, _error: told.append(text))
    with TokenSubscriber(ros.node()) as tokens:
        with ros.fake("--rate", 50) as killed:
            wait_until(lambda: tokens.publishers() == 1, 20.0, "a known publisher")
            received = tokens.received
            wait_until(lambda: tokens.received > received, 20.0, "a set of it")
            killed.process.kill()
            killed.process.wait()
        received = tokens.received
        with ros.fake("--rate", 50, "--count", 2, "--first", received + 1000):
            wait_until(lambda: tokens.latest.sequence > 1000, 20.0, "sets of its successor")
            assert tokens.publishers() == 2  # or this test shows nothing
            assert tokens.restarts == 1 and tokens.lost < 1000
        with ros.fake("--rate", 50, "--count", 5):  # and this one counts from the beginning
            wait_until(lambda: tokens.latest.sequence == 4, 20.0, "sets of the third one")
        assert any("restarted" in text for text in told) and not any("publishers" in text for text in told)


@pytest.mark.ros
def test_a_gap_after_a_killed_publisher_has_left_the_list_is_a_loss(ros, monkeypatch):
    publisher = ros.publisher()
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        for listed, sequence, counters in (
            ({b"killed"}, 5, (0, 0)),
            ({b"killed", b"successor"}, 100, (0, 1)),
            ({b"successor"}, 103, (2, 1)),
        ):
            monkeypatch.setattr(tokens._receiver, "publishers", lambda listed=frozenset(listed): listed)
            publisher.publish(to_message(make_tokens(sequence)))
            wait_until(lambda sequence=sequence: tokens.latest and tokens.latest.sequence == sequence, 20.0, "the set")
            assert (tokens.lost, tokens.restarts) == counters


@pytest.mark.ros
def test_request_waits_for_its_own_message(ros):
    with TokenSubscriber(ros.node()) as tokens:
        with pytest.raises(TimeoutError, match="no service /encode"):
            tokens.request(0.3)
        with ros.fake("--first", 4):
            assert tokens.request(20.0).sequence == 4
            assert tokens.request(20.0).sequence == 5
            with pytest.raises(TimeoutError):
                tokens.wait(0.1)  # nothing comes unasked


@pytest.mark.ros
def test_request_and_wait_inside_a_callback_do_not_block_reception(ros):
    node = ros.node()
    tokens = TokenSubscriber(node)
    got = []
    with ros.fake():
        timer = node.create_timer(0.05, lambda: got.append(tokens.request(20.0).sequence))
        ros.spin(node)
        wait_until(lambda: len(got) >= 2, 20.0, "two requests from a timer of a single-threaded executor")
        timer.cancel()
    assert got[:2] == [0, 1]


@pytest.mark.ros
def test_request_gives_the_reason_of_a_refusal(ros):
    from std_srvs.srv import Trigger

    def refuse(_request, response):
        response.success, response.message = False, "no image from front yet"
        return response

    server = ros.node("server")
    server.create_service(Trigger, "encode", refuse)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        wait_until(lambda: tokens._receiver.node.get_service_names_and_types(), 20.0, "the service")
        begin = time.monotonic()
        with pytest.raises((RuntimeError, TimeoutError)):
            tokens.request(0.1)
        assert time.monotonic() - begin < 5.0
        with pytest.raises(RuntimeError, match="no image from front yet"):
            tokens.request(3.0)


@pytest.mark.ros
def test_request_waits_for_the_message_that_was_named_and_takes_no_other(ros):
    from std_srvs.srv import Trigger

    publisher, server = ros.publisher(), ros.node("server")

    def encode(_request, response):
        publisher.publish(to_message(make_tokens(8)))  # not the one that is named, and before it
        threading.Timer(0.3, lambda: publisher.publish(to_message(make_tokens(9)))).start()
        response.success, response.message = True, "published as sequence 9, stamp 5 ns"
        return response

    server.create_service(Trigger, "encode", encode)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        publisher.publish(to_message(make_tokens(7)))
        assert tokens.wait(20.0).sequence == 7
        assert tokens.request(20.0).sequence == 9


@pytest.mark.ros
def test_request_to_a_service_that_is_busy_says_what_is_known(ros):
    from std_srvs.srv import Trigger

    answers, ended = ["the node is not active"], threading.Event()

    def encode(_request, response):
        if not answers:
            ended.wait(20.0)
        response.success, response.message = False, answers.pop() if answers else "too late"
        return response

    server = ros.node("server")
    server.create_service(Trigger, "encode", encode)
    ros.spin(server)
    try:
        with TokenSubscriber(ros.node()) as tokens:
            wait_until(lambda: tokens._receiver.node.get_service_names_and_types(), 20.0, "the service")
            with pytest.raises(RuntimeError, match="/encode: the node is not active"):
                tokens.request(3.0)
            with pytest.raises(TimeoutError, match="no answer from /encode within 0.2 s"):
                tokens.request(0.2)
    finally:
        ended.set()


@pytest.mark.ros
def test_request_waits_for_a_image_that_is_not_there_yet(ros):
    from std_srvs.srv import Trigger

    publisher, asked = ros.publisher(), []

    def encode(_request, response):
        asked.append(True)
        response.success, response.message = len(asked) >= 3, "no newer image"
        if response.success:
            publisher.publish(to_message(make_tokens(8)))
            response.message = "published as sequence 8, stamp 5 ns"
        return response

    server = ros.node("server")
    server.create_service(Trigger, "encode", encode)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        assert tokens.request(20.0).sequence == 8 and len(asked) == 3


@pytest.mark.ros
@pytest.mark.parametrize("camera", ["has another image", "has no other image"])
def test_an_answer_that_was_lost_on_the_way_is_asked_for_again(ros, camera):
    """As Fast DDS drops it while the service does not know the client's reader yet."""
    from std_srvs.srv import Trigger

    publisher, server, asked = ros.publisher(), ros.node("server"), []

    def encode(_request, response):
        asked.append(True)
        response.success = len(asked) == 1 or camera == "has another image"
        response.message = "no newer image"
        if response.success:
            publisher.publish(to_message(make_tokens(len(asked))))
            response.message = f"published as sequence {len(asked)}, stamp 5 ns"
        return response

    service = server.create_service(Trigger, "encode", encode)
    send = service.send_response
    service.send_response = lambda *answer: len(asked) == 1 or send(*answer)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        assert tokens.request(20.0).sequence == (2 if camera == "has another image" else 1)
        assert len(asked) == 2


@pytest.mark.ros
def test_a_tokenizer_that_has_answered_is_given_its_time(ros, monkeypatch):
    from std_srvs.srv import Trigger

    from vla_perception.tokens import subscriber as policy

    publisher, server, asked = ros.publisher(), ros.node("server"), []

    def encode(_request, response):
        asked.append(True)
        if len(asked) == 2:
            time.sleep(0.5)  # encoding
        publisher.publish(to_message(make_tokens(len(asked))))
        response.success, response.message = True, f"published as sequence {len(asked)}, stamp 5 ns"
        return response

    server.create_service(Trigger, "encode", encode)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        matched(publisher)
        assert tokens.request(20.0).sequence == 1
        monkeypatch.setattr(policy, "_ASK_AGAIN", 0.05)
        assert tokens.request(20.0).sequence == 2
        assert tokens.request(20.0).sequence == 3 and len(asked) == 3


@pytest.mark.ros
def test_request_does_not_repeat_what_is_refused_for_good(ros):
    from std_srvs.srv import Trigger

    asked = []

    def refuse(_request, response):
        asked.append(True)
        response.success, response.message = False, FINAL + "every latest set is encoded anyway"
        return response

    server = ros.node("server")
    server.create_service(Trigger, "encode", refuse)
    ros.spin(server)
    with TokenSubscriber(ros.node()) as tokens:
        with pytest.raises(RuntimeError, match="/encode: refused: every latest set is encoded anyway"):
            tokens.request(20.0)
    assert len(asked) == 1


@pytest.mark.ros
def test_other_schemas_images_and_damage_are_refused(ros):
    from sensor_msgs.msg import CompressedImage

    node, publisher = ros.node(), ros.publisher()
    calls = []
    tokens = TokenSubscriber(node, callback=calls.append, expect_fingerprint=MODEL["fingerprint"][:16])
    ros.spin(node)
    matched(publisher)
    good = to_message(make_tokens(0))
    bad = [
        (CompressedImage(format="jpeg", data=good.data), TokenFormatError, "not a token message"),
        (CompressedImage(format="safetensors; vla_tokens/2", data=good.data), TokenFormatError, "another version"),
        (CompressedImage(format=FORMAT, data=good.data[:-1]), TokenFormatError, "truncated"),
        (to_message(make_tokens(0, fingerprint=OTHER)), FingerprintMismatchError, "other weights"),
    ]
    for count, (message, error, words) in enumerate(bad, start=1):
        publisher.publish(message)
        wait_until(lambda count=count: tokens.rejected == count, 20.0, f"{count} refusals")
        with pytest.raises(error, match=words):
            tokens.latest  # noqa: B018
        with pytest.raises(error, match=words):
            tokens.wait(5.0)
    assert calls == []
    publisher.publish(good)
    assert tokens.wait(20.0).sequence == 0
    wait_until(lambda: len(calls) == 1, 20.0, "the callback")


@pytest.mark.ros
def test_names_follow_namespace_and_remapping(ros):
    node = ros.node("policy", namespace="/robot", cli_args=["--ros-args", "-r", "tokens:=eyes/tokens"])
    with TokenSubscriber(node) as tokens:
        assert tokens.topic == "/robot/eyes/tokens"
        publisher = ros.publisher("/robot/eyes/tokens")
        matched(publisher)
        publisher.publish(to_message(make_tokens(3)))
        assert tokens.wait(20.0).sequence == 3
        with pytest.raises(TimeoutError, match="/robot/eyes/encode"):
            tokens.request(0.1)


@pytest.mark.ros
def test_two_publishers_are_reported(ros, monkeypatch):
    told = []
    monkeypatch.setattr(TokenSubscriber, "_log", lambda _self, text, _error: told.append(text))
    first, second = ros.publisher(), ros.publisher()
    with TokenSubscriber(ros.node()) as tokens:
        for publisher in (first, second):
            matched(publisher)
        for sequence in range(3):
            first.publish(to_message(make_tokens(sequence)))
            second.publish(to_message(make_tokens(sequence)))
        wait_until(lambda: tokens.received == 6, 20.0, "all sets")
        assert any("2 publishers on /tokens" in text for text in told)


@pytest.mark.ros
def test_shutdown_ends_a_wait(ros):
    import rclpy
    from rclpy.executors import ExternalShutdownException

    tokens = TokenSubscriber(ros.node())
    threading.Timer(0.2, lambda: rclpy.shutdown(context=ros.context)).start()
    with pytest.raises(ExternalShutdownException):
        tokens.wait(20.0)
    tokens.close()


@pytest.mark.ros
@pytest.mark.parametrize("ended_by", ["close", "shutdown"])
@pytest.mark.parametrize("before", [0, 1])
def test_a_request_says_that_nothing_can_come_any_more(ros, ended_by, before):
    import rclpy
    from rclpy.executors import ExternalShutdownException

    tokens = TokenSubscriber(ros.node())
    with ros.fake():
        for _ in range(before):
            tokens.request(20.0)
    if ended_by == "close":
        tokens.close()
    else:
        rclpy.shutdown(context=ros.context)
    reason = (RuntimeError, "closed") if ended_by == "close" else (ExternalShutdownException, None)
    with pytest.raises(reason[0], match=reason[1]):
        tokens.request(20.0)
    tokens.close()


@pytest.mark.ros
@pytest.mark.parametrize("ended_by", ["close", "shutdown"])
def test_nothing_is_left_of_one_that_has_ended(ros, ended_by):
    import rclpy

    publisher, tokens = ros.publisher(), TokenSubscriber(ros.node())
    matched(publisher)
    publisher.publish(to_message(make_tokens(0)))
    thread, visual = tokens._receiver.thread, weakref.ref(tokens.wait(20.0))
    if ended_by == "close":
        tokens.close()
    else:
        rclpy.shutdown(context=ros.context)
    thread.join(20.0)
    del tokens
    wait_until(lambda: (gc.collect(), visual())[1] is None, 20.0, "the last set is freed")


@pytest.mark.ros
def test_what_shared_memory_brings_after_the_shutdown_of_ros_is_no_error(ros):
    """Its thread learns of the shutdown later: it ended with a traceback."""
    import rclpy

    tokens = TokenSubscriber(ros.node(), callback=lambda _tokens: None, shared_memory=False)
    rclpy.shutdown(context=ros.context)
    tokens._receiver.thread.join(20.0)
    tokens._intake.on_shared_memory(make_tokens(0).to_bytes(), 1)
    tokens._intake.on_writers_gone()
    tokens.close()


@pytest.mark.ros
def test_reception_goes_on_after_the_policys_node_was_destroyed(ros):
    """Policies destroy their node before they close, and nothing calls the callback then."""
    publisher, node = ros.publisher(), ros.node()
    with TokenSubscriber(node, callback=lambda _tokens: None, shared_memory=False) as tokens:
        matched(publisher)
        for sequence in range(3):
            publisher.publish(to_message(make_tokens(sequence)))
            assert tokens.wait(20.0).sequence == sequence
            node.destroy_node()
    ros.nodes.remove(node)


@pytest.mark.ros
def test_closing_wakes_the_thread_that_waits_for_messages(ros, monkeypatch):
    from rclpy.executors import SingleThreadedExecutor

    spin_once = SingleThreadedExecutor.spin_once
    monkeypatch.setattr(SingleThreadedExecutor, "spin_once", lambda self, timeout_sec: spin_once(self, 600.0))
    publisher = ros.publisher()
    with TokenSubscriber(ros.node(), shared_memory=False) as tokens:
        matched(publisher)
        publisher.publish(to_message(make_tokens(0)))
        assert tokens.wait(20.0).sequence == 0
    assert not tokens._receiver.thread.is_alive()


@pytest.mark.ros
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_policy_process_ends_on_a_signal(number):
    code = (
        "import rclpy\n"
        "from rclpy.executors import ExternalShutdownException\n"
        "from vla_perception.tokens import TokenSubscriber\n"
        "rclpy.init()\n"
        "tokens = TokenSubscriber(rclpy.create_node('policy'))\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    tokens.wait()\n"
        "except (KeyboardInterrupt, ExternalShutdownException):\n"
        "    print('ended', flush=True)\n"
    )
    with RosProcess(["-c", code], free_domain()) as process:
        process.wait_for("ready")
        assert process.stop(number) == 0, process.output
        assert "ended" in process.output
