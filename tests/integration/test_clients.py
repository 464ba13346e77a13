"""The gRPC front door as grpcio from PyPI sees it. The HTTP clients are in test_sdk_*.py."""

import unittest

from sdk_support import needs
from support import ROOT, ServeCase, completion


class GrpcStubs:
    """Not a test by itself: `cls.pb`, `cls.rpc` and stub() from proto/, for a ServeCase."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        import importlib
        import os
        import sys

        import grpc_tools
        from grpc_tools import protoc

        if "tidepool.v1.inference_pb2" not in sys.modules:
            include = os.path.join(os.path.dirname(grpc_tools.__file__), "_proto")
            code = protoc.main(
                ["protoc", f"-I{ROOT}/proto", f"-I{include}", f"--python_out={cls.serve.dir}"]
                + [f"--grpc_python_out={cls.serve.dir}", "tidepool/v1/inference.proto"]
            )
            assert code == 0
            sys.path.insert(0, cls.serve.dir)
        cls.pb = importlib.import_module("tidepool.v1.inference_pb2")
        cls.rpc = importlib.import_module("tidepool.v1.inference_pb2_grpc")

    def stub(self):
        import grpc

        channel = grpc.insecure_channel(self.serve.grpc)
        self.addCleanup(channel.close)
        return self.rpc.InferenceStub(channel)


@needs("grpc_tools")
class GrpcClientTest(GrpcStubs, ServeCase):
    def request(self, seed, **fields):
        body = completion(self.model, seed)
        sampling = self.pb.SamplingParams(temperature=0)
        return self.pb.GenerateRequest(
            model=self.model, text=body["prompt"], max_tokens=64, ignore_eos=True, sampling=sampling, **fields
        )

    def test_the_stream_equals_http(self):
        events = list(self.stub().Generate(self.request(1), timeout=60))
        whole = self.serve.post_json("/v1/completions", completion(self.model, 1))
        self.assertEqual("".join(event.text for event in events), whole["choices"][0]["text"])
        self.assertEqual(events[-1].finish_reason, "length")
        self.assertEqual(events[-1].usage.completion_tokens, 64)

    def test_bad_requests_have_a_status_code(self):
        import grpc

        request = self.request(2)
        request.sampling.temperature = 99
        with self.assertRaises(grpc.RpcError) as caught:
            list(self.stub().Generate(request, timeout=60))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertIn("temperature", caught.exception.details())

    def test_models(self):
        models = self.stub().ListModels(self.pb.ListModelsRequest(), timeout=10).models
        self.assertEqual([model.id for model in models], [self.model])

    @needs("grpc_reflection")
    def test_reflection_lists_the_services(self):
        import grpc
        from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

        with grpc.insecure_channel(self.serve.grpc) as channel:
            services = ProtoReflectionDescriptorDatabase(channel).get_services()
        self.assertIn("tidepool.v1.Inference", services)
        self.assertIn("grpc.health.v1.Health", services)


if __name__ == "__main__":
    unittest.main()
