// swift run generate [--adapter NAME]... TOKEN...: the tokens behind a prompt, a line for each adapter that
// is named, in that order. For a Mac.
import Foundation
import Kit

func fail(_ said: String) -> Never {
    FileHandle.standardError.write(Data("error: \(said)\n".utf8))
    exit(2)
}

var adapters: [String] = []
var prompt: [Int] = []
var words = CommandLine.arguments.dropFirst()
while let word = words.popFirst() {
    if word == "--adapter" {
        guard let name = words.popFirst() else { fail("--adapter needs a value") }
        adapters.append(name)
    } else if let token = Int(word) {
        prompt.append(token)
    } else {
        fail("\(word) is not a token id; usage: generate [--adapter NAME]... TOKEN...")
    }
}
do {
    let model = try Model()
    for adapter in adapters.isEmpty ? [Facts.standard] : adapters {
        let tokens = try model.generate(prompt, adapter: adapter)
        print("\(adapter): \(tokens.map(String.init).joined(separator: " "))")
    }
} catch {
    fail(error.localizedDescription)
}
