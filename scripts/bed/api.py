"""OpenStack's API, as far as a start needs it."""

import datetime
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from bed.configuration import BACKENDS
from bed.storage import Failure

REGION = "RegionOne"
ANSWER_SECONDS = 60


def is_served(url: str) -> bool:
    """By the application, and not only listened for."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=30):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 300  # a choice of versions
    except OSError:
        return False


class Api:
    """As much of Keystone's and Cinder's API as a start needs, as admin."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.keystone = f"http://127.0.0.1:{state['keystone_port']}/v3"
        self.cinder = f"http://127.0.0.1:{state['cinder_port']}/v3"
        self.glance = f"http://127.0.0.1:{state['glance_port']}"
        self._password = state["admin_password"]
        self._token = ""

    def request(self, method: str, url: str, body: Any = None) -> tuple[Any, Mapping[str, str]]:
        """What is answered, and its headers. A body of bytes is sent as it is, any other as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        headers = {"Content-Type": kind, "OpenStack-API-Version": "volume 3.70"}
        if self._token:
            headers["X-Auth-Token"] = self._token
        request = urllib.request.Request(url, data, headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=ANSWER_SECONDS) as answer:
                text = answer.read()
                return json.loads(text) if text else None, answer.headers
        except TimeoutError:
            raise Failure(f"{method} {url}: no answer within {ANSWER_SECONDS} s") from None

    def log_in(self) -> None:
        domain = {"id": "default"}
        user = {"name": "admin", "domain": domain, "password": self._password}
        scope = {"project": {"name": "admin", "domain": domain}}
        identity = {"methods": ["password"], "password": {"user": user}}
        _, headers = self.request(
            "POST", f"{self.keystone}/auth/tokens", {"auth": {"identity": identity, "scope": scope}}
        )
        self._token = headers["X-Subject-Token"]

    def get(self, url: str, key: str) -> list[dict[str, Any]]:
        return list(self.request("GET", url)[0][key])

    def register(self, name: str, purpose: str, url: str) -> None:
        """Make sure that the catalogue leads to it."""
        kind = {"type": purpose, "name": name}
        found = self.get(f"{self.keystone}/services?type={kind['type']}", "services")
        service = (
            found[0]
            if found
            else self.request("POST", f"{self.keystone}/services", {"service": kind})[0]["service"]
        )
        endpoints = self.get(f"{self.keystone}/endpoints?service_id={service['id']}", "endpoints")
        wanted = {"interface": "public", "region_id": REGION, "service_id": service["id"], "url": url}
        if not endpoints:
            self.request("POST", f"{self.keystone}/endpoints", {"endpoint": wanted})
        elif endpoints[0]["url"] != url:
            self.request("PATCH", f"{self.keystone}/endpoints/{endpoints[0]['id']}", {"endpoint": wanted})

    def make_types(self) -> None:
        known = {kind["name"] for kind in self.get(f"{self.cinder}/types", "volume_types")}
        for name in set(BACKENDS) - known:
            kind = {"name": name, "extra_specs": {"volume_backend_name": name}}
            self.request("POST", f"{self.cinder}/types", {"volume_type": kind})

    def late_backends(self, since: datetime.datetime) -> list[str]:
        """Those of which the API does not tell that they are up, and that they said so after this moment."""

        up = {host.partition("@")[2] for host in self.hosts_up("cinder-volume", since)}
        pools = self.get(f"{self.cinder}/scheduler-stats/get_pools?detail=true", "pools")
        ready = {
            pool["name"].partition("@")[2].partition("#")[0]
            for pool in pools
            if _is_new(pool["capabilities"].get("timestamp"), since)
        }
        return [name for name in BACKENDS if name not in up & ready]

    def hosts_up(self, binary: str, since: datetime.datetime) -> list[str]:
        """Where such a service is up, and said so after this moment."""
        found = self.get(f"{self.cinder}/os-services?binary={binary}", "services")
        return [it["host"] for it in found if it["state"] == "up" and _is_new(it["updated_at"], since)]


def _is_new(text: str | None, since: datetime.datetime) -> bool:
    return text is not None and datetime.datetime.fromisoformat(text) >= since
