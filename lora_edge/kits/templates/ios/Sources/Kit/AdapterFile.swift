import Foundation

/// What went wrong, in words.
public struct KitError: LocalizedError {
    public let errorDescription: String?

    init(_ said: String) {
        errorDescription = said
    }
}

/// A float32 tensor of an adapter.
struct AdapterTensor {
    let shape: [Int]
    let bytes: Data
}

/// Reads an .onnx_adapter file, a FlatBuffer of named tensors: name -> tensor.
func readAdapter(_ file: URL) throws -> [String: AdapterTensor] {
    let reader = FlatBuffer(bytes: try Data(contentsOf: file))
    guard reader.bytes.count > 8, reader.bytes[4..<8].elementsEqual("TORT".utf8) else {
        throw KitError("\(file.path) is not an .onnx_adapter file")
    }
    var found: [String: AdapterTensor] = [:]
    let (first, count) = try reader.vector(of: reader.follow(0), field: 3)
    for index in 0..<count {
        let table = try reader.follow(first + 4 * index)
        let (name, length) = try reader.vector(of: table, field: 0)
        let (dims, rank) = try reader.vector(of: table, field: 1)
        let (content, size) = try reader.vector(of: table, field: 3)
        let type = try reader.number(Int32.self, at: table + reader.place(of: table, field: 2))
        let text = String(decoding: try reader.part(name, length), as: UTF8.self)
        guard type == 1 else { throw KitError("\(text) is not float32") }
        let shape = try (0..<rank).map { Int(try reader.number(Int64.self, at: dims + 8 * $0)) }
        guard shape.allSatisfy({ $0 >= 0 }), shape.reduce(4, *) == size else {
            throw KitError("\(text) has \(size) bytes for the shape \(shape)")
        }
        found[text] = AdapterTensor(shape: shape, bytes: try reader.part(content, size))
    }
    return found
}

private struct FlatBuffer {
    let bytes: Data

    func part(_ start: Int, _ count: Int) throws -> Data {
        guard start >= 0, count >= 0, start + count <= bytes.count else {
            throw KitError("an .onnx_adapter file ends too early")
        }
        return bytes.subdata(in: start..<(start + count))
    }

    /// A number, little-endian.
    func number<T: FixedWidthInteger>(_: T.Type, at: Int) throws -> T {
        let size = MemoryLayout<T>.size
        return try part(at, size).reversed().reduce(T.zero) { ($0 << 8) | T(truncatingIfNeeded: $1) }
    }

    func follow(_ at: Int) throws -> Int {
        at + Int(try number(UInt32.self, at: at))
    }

    /// Where a table has a field, from its own place; 0: it lacks it.
    func place(of table: Int, field: Int) throws -> Int {
        let vtable = table - Int(try number(Int32.self, at: table))
        let at = 4 + 2 * field
        guard at < Int(try number(UInt16.self, at: vtable)) else { return 0 }
        return Int(try number(UInt16.self, at: vtable + at))
    }

    /// Start and length of a table's vector.
    func vector(of table: Int, field: Int) throws -> (Int, Int) {
        let at = try follow(table + place(of: table, field: field))
        return (at + 4, Int(try number(UInt32.self, at: at)))
    }
}
