/** What is asked of a row: no adapter, an adapter, or a blend `{ name: weight }`. */
export type Choice = string | null | Record<string, number>;
/** One choice for all rows, or one for each. */
export type Adapter = Choice | Choice[];

/** The part of onnxruntime-node or onnxruntime-web that is used. */
export interface Runtime {
  Tensor: new (type: any, data: any, dims?: readonly number[]) => any;
  InferenceSession?: { create(...given: any[]): Promise<any> };
}

export interface OpenOptions {
  /** onnxruntime-node or onnxruntime-web. */
  ort: Runtime;
  /** The class of @huggingface/tokenizers; without it token ids are given, not texts. */
  Tokenizer?: new (tokenizer: any, config: any) => any;
  /** Another graph of the bundle than the one that ships, e.g. `onnx/exact.onnx`. */
  graph?: string;
  /** `false`: files are not compared with their hashes. */
  verify?: boolean;
  /** Options of the session; `false`: none is opened, for `feeds` alone. */
  session?: Record<string, unknown> | false;
}

export interface GenerateOptions {
  adapter?: Choice;
  /** At most so many new tokens; 64. */
  maxNewTokens?: number;
  /** 0: the best token. */
  temperature?: number;
  topK?: number;
  topP?: number;
  /** Token ids that end the text; the model's own. */
  ends?: number[];
  /** Numbers of [0, 1) for sampling. */
  random?: () => number;
  /** Stops it between two tokens. */
  signal?: AbortSignal;
}

/** One row's inputs by name, without the batch's axis. */
export type Inputs = Record<string, ArrayLike<number>>;

/** Open a bundle: its folder (Node), or the address of its folder. */
export function open(place: string | URL, options: OpenOptions): Promise<Bundle>;

export class Bundle {
  /** `lora_edge.json`. */
  readonly manifest: any;
  /** Names, without `none`. */
  readonly adapters: string[];
  /** New token ids behind a prompt, one by one; they end at the model's end tokens. */
  generate(prompt: string | number[], options?: GenerateOptions): AsyncGenerator<number>;
  /** A whole answer as text. */
  answer(prompt: string | number[], options?: GenerateOptions): Promise<string>;
  /** Labels of each text, best first. */
  classify(
    texts: string[],
    options?: { adapter?: Adapter },
  ): Promise<{ label: string; score: number }[][]>;
  /** The embedding of each text. */
  embed(texts: string[], options?: { adapter?: Adapter }): Promise<Float32Array[]>;
  /** Outputs of a model without a cache, without padding. */
  outputs(
    rows: Inputs[],
    options?: { adapter?: Adapter },
  ): Promise<{ data: Float32Array; dims: number[] }[]>;
  /** A batch of sequences with an empty cache. */
  start(batch: number, options?: { adapter?: Adapter }): Promise<Decoding>;
  /** The adapter inputs of a batch, for whoever runs the graph by other means. */
  feeds(adapter?: Adapter, batch?: number): Promise<Record<string, any>>;
  encode(text: string, options?: { adapter?: Choice }): Promise<number[]>;
  decode(ids: number[], options?: { adapter?: Choice }): Promise<string>;
}

export class Decoding {
  /** The token ids of each row that are in the cache. */
  readonly history: number[][];
  /** Append tokens; an empty row rests. Logits after each row's last token, or after every one. */
  extend(rows: number[][], options?: { every?: boolean }): Promise<Float32Array[]>;
  /** Append one token to each row; `null`: the row rests. */
  step(tokens: (number | null)[]): Promise<Float32Array[]>;
}

/** The tensors of an `.onnx_adapter` file. */
export function parseAdapter(
  bytes: Uint8Array,
  source?: string,
): Map<string, { type: string; dims: number[]; data: Float32Array | Uint16Array }>;

/** What is refused: a file, an argument, or a bundle that cannot be run here. */
export class BundleError extends Error {}
