import Foundation
import OnnxRuntimeBindings

private let known: Set<String> = [
    "input_ids", "attention_mask", "position_ids", "num_logits_to_keep",
]

/// The bundle's graph in ONNX Runtime, its adapters and its cache. Not to be used by two threads at once.
public final class Model {
    private let folder: URL
    private let session: ORTSession
    private let environment: ORTEnv
    private let inputs: [String]
    private var loaded: [String: [String: ORTValue]] = [:]

    /// The bundle that this package brings.
    public static var bundled: URL {
        Bundle.module.resourceURL!.appendingPathComponent("bundle")
    }

    /// Opens the bundle in a folder; throws where it is not the one that `Facts` tells of.
    public init(folder: URL = Model.bundled) throws {
        self.folder = folder
        guard let manifest = try? Data(contentsOf: folder.appendingPathComponent("lora_edge.json")) else {
            throw KitError("\(folder.path) has no lora_edge.json: it is no bundle")
        }
        guard hash(manifest) == Facts.manifest else {
            throw KitError(
                "\(folder.path) is not the bundle that this package was written for; write the project again: "
                    + "lora-edge kit BUNDLE ios -o FOLDER --force")
        }
        environment = try ORTEnv(loggingLevel: .error)
        let graph = folder.appendingPathComponent(Facts.graph).path
        session = try ORTSession(env: environment, modelPath: graph, sessionOptions: nil)
        inputs = try session.inputNames().filter { !$0.hasPrefix("lora.") && !$0.hasPrefix("past_key_values.") }
        if let odd = inputs.first(where: { !known.contains($0) }) {
            throw KitError("the graph has the input \(odd), which is not fed here")
        }
    }

    /// The likeliest tokens behind a prompt: `most` at most, without the one that ends the text. Adapters are
    /// switched from call to call.
    public func generate(_ prompt: [Int], adapter: String = Facts.standard, most: Int = 64) throws -> [Int] {
        guard !prompt.isEmpty else { throw KitError("the prompt is empty") }
        if let wrong = prompt.first(where: { $0 < 0 || $0 >= Facts.vocabulary }) {
            throw KitError("token \(wrong) is not below \(Facts.vocabulary)")
        }
        var wanted = most
        if Facts.longest > 0 {
            guard prompt.count <= Facts.longest else {
                throw KitError("the prompt has \(prompt.count) tokens, and the model reads \(Facts.longest)")
            }
            wanted = min(most, Facts.longest - prompt.count + 1)
        }
        let chosen = try find(adapter)
        let start = startOf(chosen.invocation, in: prompt)
        // Before its invocation, such an adapter changes nothing.
        let then = start < prompt.count ? adapter : Facts.standard
        var cache = try empty()
        var length = 0
        func extend(_ ids: [Int], _ name: String) throws -> Int {
            let fed = try tensors(ids, behind: length)
                .merging(cache) { $1 }
                .merging(try active(name)) { $1 }
            let found = try session.run(
                withInputs: fed, outputNames: Set([Facts.output] + cacheNames("present")), runOptions: nil)
            length += ids.count
            cache = [:]
            for name in cacheNames("past_key_values") {
                cache[name] = found[name.replacingOccurrences(of: "past_key_values", with: "present")]
            }
            return try likeliest(found[Facts.output]!)
        }
        var token = 0
        if start > 0 { token = try extend(Array(prompt[..<start]), Facts.standard) }
        if start < prompt.count { token = try extend(Array(prompt[start...]), then) }
        var tokens: [Int] = []
        while tokens.count < wanted, !chosen.ends.contains(token) {
            tokens.append(token)
            if tokens.count < wanted { token = try extend([token], then) }
        }
        return tokens
    }

    /// The graph's inputs that make an adapter. ONNX Runtime's Objective-C has no call for .onnx_adapter
    /// files: they are read here, and fed.
    private func active(_ adapter: String) throws -> [String: ORTValue] {
        if let found = loaded[adapter] { return found }
        let file = try find(adapter).file
        guard !file.isEmpty else { return [:] }
        let found = try readAdapter(folder.appendingPathComponent(file)).mapValues {
            try value($0.bytes, .float, $0.shape)
        }
        loaded[adapter] = found
        return found
    }

    private func tensors(_ ids: [Int], behind length: Int) throws -> [String: ORTValue] {
        let total = length + ids.count
        var fed: [String: ORTValue] = [:]
        for name in inputs {
            switch name {
            case "input_ids": fed[name] = try whole(ids, [1, ids.count])
            case "attention_mask": fed[name] = try whole(Array(repeating: 1, count: total), [1, total])
            case "position_ids": fed[name] = try whole(Array(length..<total), [1, ids.count])
            default: fed[name] = try whole([1], [])  // the logits of one token are computed
            }
        }
        return fed
    }

    private func empty() throws -> [String: ORTValue] {
        let shape = [1, Facts.heads, 0, Facts.headSize]
        return try Dictionary(
            uniqueKeysWithValues: cacheNames("past_key_values").map { ($0, try value(Data(), .float, shape)) })
    }

    private func likeliest(_ logits: ORTValue) throws -> Int {
        let data = try logits.tensorData() as Data
        let vocabulary = try logits.tensorTypeAndShapeInfo().shape.last!.intValue
        return data.withUnsafeBytes { bytes in
            let last = bytes.bindMemory(to: Float.self).suffix(vocabulary)
            var best = last.startIndex
            for index in last.indices where last[index] > last[best] { best = index }
            return best - last.startIndex
        }
    }
}

private func whole(_ values: [Int], _ shape: [Int]) throws -> ORTValue {
    let bytes = values.map(Int64.init).withUnsafeBufferPointer { Data(buffer: $0) }
    return try value(bytes, .int64, shape)
}

private func value(_ bytes: Data, _ type: ORTTensorElementDataType, _ shape: [Int]) throws -> ORTValue {
    try ORTValue(
        tensorData: NSMutableData(data: bytes), elementType: type, shape: shape.map { NSNumber(value: $0) })
}

private func cacheNames(_ what: String) -> [String] {
    (0..<Facts.layers).flatMap { ["\(what).\($0).key", "\(what).\($0).value"] }
}

private func find(_ name: String) throws -> Adapter {
    guard let found = Facts.adapters.first(where: { $0.name == name }) else {
        let names = Facts.adapters.map(\.name).joined(separator: ", ")
        throw KitError("there is no adapter \(name); there are: \(names)")
    }
    return found
}

/// The place from which an adapter is active; the prompt's length: nowhere.
private func startOf(_ invocation: [Int], in prompt: [Int]) -> Int {
    guard !invocation.isEmpty else { return 0 }
    let places = stride(from: prompt.count - invocation.count, through: 0, by: -1)
    return places.first { Array(prompt[$0..<($0 + invocation.count)]) == invocation } ?? prompt.count
}

/// FNV-1a, 64 bits.
private func hash(_ bytes: Data) -> UInt64 {
    bytes.reduce(14_695_981_039_346_656_037) { ($0 ^ UInt64($1)) &* 1_099_511_628_211 }
}
