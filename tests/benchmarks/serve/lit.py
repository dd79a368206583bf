"""LitServe, joining requests: python -m tests.benchmarks.serve.lit PORT."""

import sys

import litserve
import torch

from tests.benchmarks.serve.rivals import Answer, Request, make_net, rows


class Api(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.net = make_net()

    def decode_request(self, request: Request) -> torch.Tensor:
        return rows(request)

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        self.sizes = [len(tensor) for tensor in inputs]
        return torch.cat(inputs)

    def predict(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.net(batch)[:, 0]

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(output.split(self.sizes))

    def encode_response(self, output: torch.Tensor) -> Answer:
        return Answer(predictions=output.tolist())


def main() -> None:
    server = litserve.LitServer(Api(max_batch_size=64, batch_timeout=0.001), accelerator="cpu", timeout=60)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False, generate_client_file=False
    )


if __name__ == "__main__":
    main()
