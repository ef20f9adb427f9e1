plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "kit"
    compileSdk = 35
    defaultConfig {
        applicationId = "kit.generate"
        minSdk = 24
        targetSdk = 35
        versionCode = 1
        versionName = "1"
    }
    // They are copied out of the app's file once, and hardly get smaller.
    androidResources { noCompress += listOf("onnx", "onnx_data", "onnx_adapter") }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
}

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.29.0")
}
