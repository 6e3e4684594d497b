"""A client that knows only the address: messages are built from what the server's reflection tells."""

import time
from pathlib import Path

import grpc
import pytest
from conftest import PORTRAIT, Server, check_video
from google.protobuf import any_pb2, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "avatar.v1.AvatarService"
CHUNK_BYTES = 1 << 20
CALL_SECONDS = 300

# The standard error details. No method names them, so a server does not reflect them.
ERROR_DETAILS = """
name: "error_details.proto" package: "google.rpc" syntax: "proto3" dependency: "google/protobuf/any.proto"
message_type {
  name: "Status"
  field { name: "code" number: 1 label: LABEL_OPTIONAL type: TYPE_INT32 }
  field { name: "message" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "details" number: 3 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".google.protobuf.Any" }
}
message_type {
  name: "BadRequest"
  field {
    name: "field_violations" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".google.rpc.BadRequest.FieldViolation"
  }
  nested_type {
    name: "FieldViolation"
    field { name: "field" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "description" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING }
  }
}
"""


class Client:
    """Calls methods of one service by name."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = DescriptorPool(self.database)

    def message(self, name: str, **fields):
        """A message of the package, by its short name."""
        return GetMessageClass(self.pool.FindMessageTypeByName(f"avatar.v1.{name}"))(**fields)

    def call(self, name: str, request, service: str = SERVICE):
        """One rpc; a stream goes in as an iterator and comes out as one."""
        method = self.pool.FindServiceByName(service).methods_by_name[name]
        streams = (method.client_streaming, method.server_streaming)
        kind = "_".join("stream" if many else "unary" for many in streams)
        rpc = getattr(self.channel, kind)(
            f"/{service}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        return rpc(request, timeout=CALL_SECONDS)

    def inputs(self, request: str, picture: Path, audio: Path, **spec):
        """The messages that carry a specification and two files."""
        yield self.message(request, spec=self.message("GenerationSpec", **spec))
        for field, path in (("picture_chunk", picture), ("audio_chunk", audio)):
            data = path.read_bytes()
            for start in range(0, len(data), CHUNK_BYTES):
                yield self.message(request, **{field: data[start : start + CHUNK_BYTES]})

    def state(self, name: str) -> int:
        """Number of a generation's state."""
        states = self.pool.FindEnumTypeByName("avatar.v1.GenerationState")
        return states.values_by_name[f"GENERATION_STATE_{name}"].number


@pytest.fixture
def client(server: Server):
    """A client of the running server."""
    client = Client(server.grpc)
    yield client
    client.channel.close()


def test_reflection_lists_the_service_and_health(client: Client) -> None:
    assert {SERVICE, "grpc.health.v1.Health"} <= set(client.database.get_services())


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_serving(client: Client, service: str) -> None:
    kind = client.pool.FindMessageTypeByName("grpc.health.v1.HealthCheckRequest")
    answer = client.call("Check", GetMessageClass(kind)(service=service), "grpc.health.v1.Health")
    status = answer.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number[answer.status]
    assert status.name == "SERVING"


def test_generate_makes_a_video_in_one_call(client: Client, speech: Path, tmp_path: Path) -> None:
    requests = client.inputs("GenerateRequest", PORTRAIT, speech, prompt="A woman speaks.", seed=7, steps=2, size=64)
    events, video = [], b""
    for response in client.call("Generate", requests):
        if response.WhichOneof("body") == "event":
            assert not video, "an event came after the first byte of the video"
            events.append(response.event)
        else:
            assert len(response.video_chunk) <= CHUNK_BYTES
            video += response.video_chunk

    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert len({event.generation_id for event in events}) == 1
    last = events[-1]
    assert last.state == client.state("COMPLETED")
    assert (last.progress.step, last.progress.steps) == (2, 2)
    assert last.outcome.video_bytes == len(video)
    assert len(last.outcome.stages) >= 5

    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    check_video(path, speech)


def test_create_watch_download_and_delete(client: Client, speech: Path, tmp_path: Path) -> None:
    requests = client.inputs("CreateGenerationRequest", PORTRAIT, speech, steps=1, size=64)
    generation = client.call("CreateGeneration", requests).generation
    one = {"generation_id": generation.generation_id}

    watched = client.call("WatchGeneration", client.message("WatchGenerationRequest", **one))
    events = [answer.event for answer in watched]
    assert events[-1].state == client.state("COMPLETED"), events[-1].failure.message
    stored = client.call("GetGeneration", client.message("GetGenerationRequest", **one)).generation
    assert stored.state == client.state("COMPLETED")
    assert stored.outcome == events[-1].outcome

    def download(offset: int) -> bytes:
        request = client.message("DownloadVideoRequest", offset=offset, **one)
        return b"".join(answer.data for answer in client.call("DownloadVideo", request))

    video = download(0)
    assert len(video) == stored.outcome.video_bytes
    assert download(1000) == video[1000:]
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    check_video(path, speech, stored.frames)

    client.call("DeleteGeneration", client.message("DeleteGenerationRequest", **one))
    with pytest.raises(grpc.RpcError) as gone:
        client.call("GetGeneration", client.message("GetGenerationRequest", **one))
    assert gone.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_wrong_input_is_refused_by_name(client: Client, speech: Path) -> None:
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as refused:
        list(client.call("Generate", client.inputs("GenerateRequest", PORTRAIT, speech, steps=10_000)))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert all(word in refused.value.details() for word in ("steps", "10000", "200"))
    assert time.monotonic() - started < 10


def test_a_refusal_carries_field_violations(client: Client, speech: Path) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        client.call("CreateGeneration", client.inputs("CreateGenerationRequest", PORTRAIT, speech, steps=0))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    pool = DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(text_format.Parse(ERROR_DETAILS, FileDescriptorProto()))
    status_type, bad_request_type = (
        GetMessageClass(pool.FindMessageTypeByName(f"google.rpc.{name}")) for name in ("Status", "BadRequest")
    )
    status = status_type.FromString(dict(refused.value.trailing_metadata())["grpc-status-details-bin"])
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    violations = [
        violation
        for detail in status.details
        if detail.type_url == "type.googleapis.com/google.rpc.BadRequest"
        for violation in bad_request_type.FromString(detail.value).field_violations
    ]
    assert [violation.field for violation in violations] == ["steps"]
    assert "0" in violations[0].description and "200" in violations[0].description
