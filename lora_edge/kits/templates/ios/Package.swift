// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "generate",
    platforms: [.iOS(.v15), .macOS(.v14)],
    products: [.library(name: "Kit", targets: ["Kit"])],
    dependencies: [
        .package(url: "https://github.com/microsoft/onnxruntime-swift-package-manager", exact: "1.24.2")
    ],
    targets: [
        .target(
            name: "Kit",
            dependencies: [.product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")],
            resources: [.copy("bundle")]
        ),
        .executableTarget(name: "generate", dependencies: ["Kit"]),
    ]
)
