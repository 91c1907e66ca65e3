"""A stand-in for bondpy (ros/bond_core, branch ros2), whose messages are not on PyPI: its class's interface, over std_msgs.

A heartbeat is a line of JSON: id, instance_id, active, heartbeat_period, heartbeat_timeout, as bond/msg/Status has them.
"""

from __future__ import annotations

import json
import threading
import uuid

from std_msgs.msg import String


class Bond:
    def __init__(self, node, topic, bond_id, on_broken=None, on_formed=None):
        self.id, self.instance_id, self.sister = bond_id, str(uuid.uuid4()), None
        self.on_broken, self.on_formed = on_broken, on_formed
        self.heartbeat_period, self.heartbeat_timeout = 1.0, 4.0
        self._node, self._topic = node, topic
        self._ended, self._last = threading.Event(), 0.0
        self.pub = node.create_publisher(String, topic, 1)

    def start(self):
        self.sub = self._node.create_subscription(String, self._topic, self._on_status, 1)
        self._timer = threading.Timer(self.heartbeat_timeout, self._broken)
        self._timer.daemon = True
        self._timer.start()
        threading.Thread(target=self._beat, daemon=True).start()

    def set_broken_callback(self, on_broken):
        self.on_broken = on_broken

    def shutdown(self):
        self._ended.set()
        self._timer.cancel()
        self.sub.destroy()
        self._publish(False)
        self.pub.destroy()

    def _beat(self):
        while not self._ended.is_set():
            self._publish(True)
            self._ended.wait(self.heartbeat_period)

    def _publish(self, active):
        keys = ("id", "instance_id", "heartbeat_period", "heartbeat_timeout")
        self.pub.publish(String(data=json.dumps({key: getattr(self, key) for key in keys} | {"active": active})))

    def _on_status(self, message):
        status = json.loads(message.data)
        if status["id"] != self.id or status["instance_id"] == self.instance_id:
            return
        formed, self.sister = self.sister is None, status["instance_id"]
        self._timer.cancel()
        self._timer = threading.Timer(self.heartbeat_timeout, self._broken)
        self._timer.daemon = True
        self._timer.start()
        if formed and self.on_formed:
            self.on_formed()

    def _broken(self):
        if not self._ended.is_set() and self.on_broken:
            self.on_broken()
